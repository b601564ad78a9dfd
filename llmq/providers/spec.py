"""What the simulated provider is like."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Ratio = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ProviderSpec(BaseModel):
    """Behaviour of the simulated provider. Everything random depends on (seed, request body, attempt) only."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    seed: int = Field(0, description="Same seed, same answers, latencies and faults.")
    latency_seconds: Positive = Field(0.1, description="Mean service time, apart from the tokens written.")
    seconds_per_token: float = Field(0.0, ge=0, description="Added for each token of the answer.")
    sigma: float = Field(0.25, ge=0, le=3, description="Spread of the log-normal latency (of its logarithm).")
    answer_tokens: int = Field(60, ge=1, description="Mean length of a free-text answer.")
    load_slots: Positive | None = Field(None, description="Above so many in flight, latency grows in proportion.")
    requests_per_minute: Positive | None = Field(None, description="Limit; null: none.")
    tokens_per_minute: Positive | None = Field(None, description="Limit, prompt and answer together; null: none.")
    bucket_seconds: Positive = Field(60.0, description="Depth of both buckets: so many seconds' worth as a burst.")
    max_concurrency: int | None = Field(None, ge=1, description="Requests at once, more are refused; null: no limit.")
    refusal_seconds: float = Field(0.005, ge=0, description="Time that a refusal takes.")
    error_ratio: Ratio = Field(0.0, description="Share of requests answered with 500.")
    timeout_ratio: Ratio = Field(0.0, description="Share of requests that hang for hang_seconds.")
    hang_seconds: Positive = Field(600.0, description="How long a hanging request hangs before its 504.")
    cut_ratio: Ratio = Field(0.0, description="Share of answers whose connection is cut half-way.")
    malformed_ratio: Ratio = Field(0.0, description="Share of answers whose content is not what was asked for.")
    slow_stages: dict[str, Positive] = Field(
        default_factory=dict, description="Latency factor by stage label, {features_2: 5}."
    )
