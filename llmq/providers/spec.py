"""What the simulated provider is like."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Ratio = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Factor = Annotated[float, Field(gt=0, le=1e6)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Window = Literal["bucket", "fixed", "sliding"]
Dialect = Literal["openai", "anthropic", "azure", "bare"]


class ProviderSpec(BaseModel):
    """Behaviour of the simulated provider. Everything random depends on (seed, request body, attempt) only."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    seed: int = Field(0, description="Same seed, same answers, latencies and faults.")
    latency_seconds: Positive = Field(0.1, description="Mean service time, apart from the tokens written.")
    seconds_per_token: Seconds = Field(0.0, description="Added for each token of the answer.")
    sigma: float = Field(0.25, ge=0, le=3, description="Spread of the log-normal latency (of its logarithm).")
    answer_tokens: int = Field(60, ge=1, description="Mean length of a free-text answer.")
    load_slots: Positive | None = Field(None, description="Above so many in flight, latency grows in proportion.")
    server_slots: int | None = Field(None, ge=1, description="Requests worked on at once, the others wait in line.")
    cold_seconds: Seconds = Field(0.0, description="Time from the first request until a cold server is warm.")
    cold_factor: float = Field(
        5.0, ge=1, allow_inf_nan=False, description="Latency factor at the first request, falls to 1 in cold_seconds."
    )
    requests_per_minute: Positive | None = Field(None, description="Limit; null: none.")
    tokens_per_minute: Positive | None = Field(None, description="Limit, prompt and answer together; null: none.")
    window: Window = Field("bucket", description="How both limits count: bucket, fixed, sliding.")
    bucket_seconds: Positive = Field(
        60.0, description="Depth of both buckets, so many seconds' worth as a burst; or the length of the window."
    )
    limit_factors: tuple[Factor, ...] = Field(
        (1.0,), min_length=1, description="Both limits are multiplied by these in turn, cyclically."
    )
    factor_seconds: float = Field(
        60.0, ge=0.001, allow_inf_nan=False, description="How long each of limit_factors holds."
    )
    max_concurrency: int | None = Field(None, ge=1, description="Requests at once, more are refused; null: no limit.")
    refusal_seconds: Seconds = Field(0.005, description="Time that a refusal takes.")
    refusal_ratio: Ratio = Field(0.0, description="Share of sendings refused with 429 for no reason that is told.")
    dialect: Dialect = Field("openai", description="Whose headers and words tell of limits; bare: nothing is told.")
    retry_after: Literal["honest", "none"] | Seconds = Field(
        "honest", description="Retry-After of refusals: true, left out, or always so many seconds."
    )
    error_ratio: Ratio = Field(0.0, description="Share of requests answered with 500.")
    timeout_ratio: Ratio = Field(0.0, description="Share of requests that hang for hang_seconds.")
    hang_seconds: Positive = Field(600.0, description="How long a hanging request hangs before its 504.")
    cut_ratio: Ratio = Field(0.0, description="Share of answers whose connection is cut half-way.")
    malformed_ratio: Ratio = Field(0.0, description="Share of answers whose content is not what was asked for.")
    slow_stages: dict[str, Positive] = Field(
        default_factory=dict, description="Latency factor by stage label, {features_2: 5}."
    )
