"""The settings of a process, and where each value came from.

Order: argument, then environment (`SA_` before the name in capitals; lists as JSON), then YAML (`config_file`, else
`config/app.yaml` in the working directory if it is there), then default. What is not known or cannot be used is
refused with its file, line or variable and the nearest known name. Keys of providers are never settings: a
setting only names the environment variable that holds one.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from llmq.core import Cap, Depth, FairShare, Policy, Priority, Rate
from llmq.core.policy import AGEING_SECONDS
from llmq.core.rates import paces
from llmq.errors import ConfigError
from llmq.ledger import Budget, Ledger, Price, check_budgets
from llmq.providers.spec import ProviderSpec
from llmq.retry import Retry

ENV_PREFIX = "SA_"
GUARDED_ENV_PREFIX = "SA_LLM_"
DEFAULT_CONFIG_FILE = Path("config/app.yaml")

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _not_a_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("expected a whole number")
    return value


def _yaml_off(value: object) -> object:
    """YAML 1.1 reads a bare `off` as false."""
    return "off" if value is False else value


Count = Annotated[int, BeforeValidator(_not_a_bool), Field(ge=1)]
Places = Annotated[int, BeforeValidator(_not_a_bool), Field(ge=0)]
NotNegative = Annotated[float, BeforeValidator(_not_a_bool), Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, BeforeValidator(_not_a_bool), Field(gt=0, allow_inf_nan=False)]


def _http_url(url: str | None) -> str | None:
    if url is not None and not url.startswith(("http://", "https://")):
        raise ValueError("must start with http:// or https://")
    return url


class _Limit(BaseModel):
    """One entry of `llm_queue_limits`, checked by making the limit that it stands for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    by: str | None = None

    def made(self) -> Cap | Rate | Depth:
        """The limit."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            self.made()
        except TypeError as error:
            raise ValueError(str(error)) from None
        return self


class CapEntry(_Limit):
    """`{cap: 8, by: model_name, overrides: {large: 2}}`: see `llmq.Cap`."""

    cap: Count
    overrides: dict[str | None, Count] = {}

    def made(self) -> Cap:
        """The limit."""
        return Cap(self.cap, self.by, self.overrides)


class RateEntry(_Limit):
    """`{rate: 500, per: minute, of: requests, by: model_name, burst: 0, overrides: {large: 60}}`: see `llmq.Rate`."""

    rate: Positive
    per: Literal["second", "minute", "hour", "day"] = "minute"
    of: Literal["requests", "tokens"] = "requests"
    burst: float = Field(0, ge=0, allow_inf_nan=False)
    overrides: dict[str | None, Positive] = {}

    def made(self) -> Rate:
        """The limit."""
        return Rate(self.rate, self.per, self.of, self.by, self.burst, self.overrides)


class DepthEntry(_Limit):
    """`{max_queued: 50, by: service_id, overrides: {}}`: see `llmq.Depth`."""

    max_queued: Places
    overrides: dict[str | None, Places] = {}

    def made(self) -> Depth:
        """The limit."""
        return Depth(self.max_queued, self.by, self.overrides)


class FairShareEntry(BaseModel):
    """`{by: service_id, weights: {a: 3}, of: calls}`: see `llmq.FairShare`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    by: str = Field(min_length=1)
    weights: dict[str | None, Positive] = {}
    of: Literal["calls", "tokens"] = "calls"

    def made(self) -> FairShare:
        """The share."""
        return FairShare(self.by, self.weights, self.of)


class PriceEntry(BaseModel):
    """`{input: 2.5, output: 10}`, in USD per million tokens: see `llmq.Price`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: NotNegative
    output: NotNegative

    def made(self) -> Price:
        """The price."""
        return Price(self.input, self.output)

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.made()
        return self


class BudgetEntry(BaseModel):
    """`{cost: 5, per: run, by: service_id, overrides: {a: 1}}`, or `tokens` for `cost`: see `llmq.Budget`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: Positive | None = None
    cost: Positive | None = None
    per: Literal["run", "day"] = "run"
    by: str | None = None
    overrides: dict[str, Positive] = {}

    def made(self) -> Budget:
        """The budget."""
        return Budget(self.tokens, self.cost, self.per, self.by, self.overrides)

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.made()
        return self


def _kind_of_limit(entry: object) -> str | None:
    names = entry if isinstance(entry, Mapping) else type(entry).model_fields if isinstance(entry, _Limit) else ()
    return next((kind for kind in ("cap", "rate", "max_queued") if kind in names), None)


LimitEntry = Annotated[
    Annotated[CapEntry, Tag("cap")] | Annotated[RateEntry, Tag("rate")] | Annotated[DepthEntry, Tag("max_queued")],
    Discriminator(
        _kind_of_limit,
        custom_error_type="limit",
        custom_error_message="a limit is a mapping with one of the keys cap, rate, max_queued",
    ),
]


class Settings(BaseSettings):
    """Every setting, with its default. See `config/app.example.yaml` for the same as a file.

    Raises `ConfigError` for anything unknown or unusable.
    """

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True, validate_default=True)

    llm_queue_enabled: bool = Field(False, description="Send every call through the process's one queue.")
    llm_queue_concurrency: Count = Field(3, description="Calls in flight at once, with the queue on.")
    llm_queue_limits: tuple[LimitEntry, ...] = Field(
        (), description="Caps, rates and depths, by model or any other field or label; all of them hold."
    )
    llm_queue_requests_per_minute: Positive | None = Field(
        None, description="Starts in a minute, in all, evenly paced; null: no pace. Short for an entry of the limits."
    )
    llm_queue_tokens_per_minute: Positive | None = Field(
        None, description="Tokens in a minute, in all, evenly paced; null: no pace. Short for an entry of the limits."
    )
    llm_queue_max_queued: Places | None = Field(None, description="Calls that may wait, in all; null: no bound.")
    llm_queue_overflow: Literal["wait", "reject", "drop_oldest"] = Field(
        "wait", description="What a full queue does: callers wait, the newest is refused, the oldest dropped."
    )
    llm_queue_ageing_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        AGEING_SECONDS, description="A class that has waited so long gets every fourth start; null: never."
    )
    llm_queue_strict: tuple[Literal["urgent", "high", "normal", "low"], ...] = Field(
        (), description="Classes that nothing lower passes, however long it has waited."
    )
    llm_queue_fair_share: FairShareEntry | None = Field(
        None, description="Share each class between the values of a field or label, by weights; null: first come."
    )
    llm_telemetry_service_id: bool = Field(
        False, description="service_id as an attribute of metrics too: for runs of a few services."
    )
    llm_telemetry_attempts: bool = Field(
        True, description="Spans and gen_ai metrics of attempts; false where an instrumentation of the SDK makes them."
    )
    llm_telemetry_content: bool = Field(
        False, description="Prompts and answers on the spans of requests that are seen (llmq.wrap)."
    )
    llm_prices: dict[str, PriceEntry] = Field({}, description="By model: USD per million tokens, input and output.")
    llm_budgets: tuple[BudgetEntry, ...] = Field(
        (), description="Tokens or cost (USD) per run or UTC day, by a field or in all; past one, no call starts."
    )
    llm_budget_ledger: Path | None = Field(
        None, description="File that keeps what budgets per day have used; null: counted by each process anew."
    )
    concurrency: Count = Field(5, description="Services (items) open at once; bounds memory, never calls.")
    request_timeout: Seconds | None = Field(60.0, description="Seconds a call may run in its slot; null: no bound.")
    queue_timeout: Seconds | None = Field(None, description="Seconds a call may wait for a slot; null: no bound.")
    retry_attempts: Count = Field(4, description="Attempts of a call, the first included.")
    retry_base_seconds: float = Field(0.5, ge=0, description="Back-off before the second attempt, at most.")
    retry_cap_seconds: float = Field(30.0, ge=0, description="Back-off before any attempt, at most.")
    provider: Literal["simulated", "openai"] = Field(
        "simulated", description="simulated: in this process, no key, no cost. openai: base_url, any compatible one."
    )
    base_url: Annotated[str | None, AfterValidator(_http_url)] = Field(
        None, description="Endpoint of an OpenAI-compatible provider, with its /v1; null: the SDK's own."
    )
    model: str = Field("simulated-1", min_length=1, description="Model to ask for.")
    models: dict[Literal["descriptions", "features", "mapping", "ambitions"], str] = Field(
        {}, description="Another model for a kind of stage: descriptions, features, mapping, ambitions."
    )
    api_key_env: str = Field(
        "OPENAI_API_KEY", min_length=1, description="Name of the environment variable that holds the key."
    )
    simulate: ProviderSpec = Field(
        ProviderSpec(), description="Behaviour of the simulated provider; every key in `llmq provider --help`."
    )
    cache_mode: Annotated[Literal["off", "read", "refresh", "write"], BeforeValidator(_yaml_off)] = Field(
        "off",
        description="Answer cache. read: use it. write: use it and add to it. refresh: ask anew and overwrite.",
    )
    cache_dir: Path = Field(Path(".llmq/cache"), description="Folder of the answer cache.")
    transcripts_dir: Path | None = Field(
        None, description="Folder for prompts and answers, a file a service; null: none are kept."
    )
    catalogues_dir: Path | None = Field(
        None, description="Folder with applications.json, technologies.json, information.json; null: the samples."
    )

    _sources: dict[str, str] = PrivateAttr(default_factory=dict)

    def __init__(self, config_file: str | os.PathLike[str] | None = None, **arguments: Any) -> None:
        path = _config_path(config_file)
        known = type(self).model_fields
        _refuse_unknown(arguments, known, "argument")
        in_file = {} if path is None else _read_yaml(path, known)
        in_environment = _read_environment(type(self))
        merged = {**in_file, **in_environment, **arguments}
        sources = dict.fromkeys(known, "default")
        sources |= dict.fromkeys(in_file, str(path))
        sources |= {name: f"environment {ENV_PREFIX}{name.upper()}" for name in in_environment}
        sources |= dict.fromkeys(arguments, "argument")
        try:
            super().__init__(**merged)
        except ValidationError as error:
            raise ConfigError(_explain(error, sources)) from None
        self._sources = sources
        if self.retry_base_seconds > self.retry_cap_seconds:
            raise ConfigError(
                f"retry_base_seconds={self.retry_base_seconds:g} ({sources['retry_base_seconds']}) is more than "
                f"retry_cap_seconds={self.retry_cap_seconds:g} ({sources['retry_cap_seconds']})"
            )

        try:
            _ = self.queue_policy
        except ValueError as error:
            raise ConfigError(f"llm_queue_limits ({sources['llm_queue_limits']}): {error}") from None
        try:
            check_budgets(self.budgets)
        except ValueError as error:
            raise ConfigError(f"llm_budgets ({sources['llm_budgets']}): {error}") from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what `__init__` merged: it must know where each value came from."""
        assert isinstance(init_settings, InitSettingsSource)
        return (init_settings,)

    def source_of(self, name: str) -> str:
        """Where a setting's value came from: argument, environment NAME, a file, or default."""
        return self._sources[name]

    @property
    def queue_policy(self) -> Policy:
        """Limits and order of the process's queue."""
        depth = () if self.llm_queue_max_queued is None else (Depth(self.llm_queue_max_queued),)
        return Policy(
            self.llm_queue_concurrency,
            (
                *(entry.made() for entry in self.llm_queue_limits),
                *paces(self.llm_queue_requests_per_minute, self.llm_queue_tokens_per_minute),
                *depth,
            ),
            self.llm_queue_overflow,
            self.llm_queue_ageing_seconds,
            frozenset(Priority[name.upper()] for name in self.llm_queue_strict),
            None if self.llm_queue_fair_share is None else self.llm_queue_fair_share.made(),
        )

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """How much may be used."""
        return tuple(entry.made() for entry in self.llm_budgets)

    @property
    def prices(self) -> dict[str, Price]:
        """By model."""
        return {model: entry.made() for model, entry in self.llm_prices.items()}

    def ledger(self) -> Ledger:
        """A new ledger; it goes on from the day's totals if there is a file of them. Raises InputError."""
        return Ledger(self.prices, self.budgets, path=self.llm_budget_ledger)

    @property
    def stage_models(self) -> dict[str, str]:
        """The models of the kinds of stages that have one of their own."""
        return {str(kind): model for kind, model in self.models.items()}

    @property
    def retry(self) -> Retry:
        """The retry policy of every call, with the queue on or off."""
        return Retry(self.retry_attempts, self.retry_base_seconds, self.retry_cap_seconds)


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean ...?)`, or nothing where no known name is near."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {found[0]}?)" if found else ""


def parse_assignments(pairs: Iterable[str], model: type[BaseModel]) -> dict[str, Any]:
    """`["a=1", ...]` as a dict, values read as YAML; refuses what `model` does not know."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"expected NAME=VALUE, got {pair!r}")
        _refuse_unknown([name], model.model_fields, "option")
        try:
            found[name] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):
            raise ConfigError(f"{name}: cannot read {value!r}; mappings are written as {{a: 1}}") from None
    return found


def _config_path(named: str | os.PathLike[str] | None) -> Path | None:
    if named is None:
        return DEFAULT_CONFIG_FILE if DEFAULT_CONFIG_FILE.is_file() else None
    path = Path(named)
    if not path.is_file():
        raise ConfigError(f"the configuration file {path} is {'a folder' if path.is_dir() else 'not there'}")
    return path


def _read_yaml(path: Path, known: Iterable[str]) -> dict[str, Any]:
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if found is None:
        return {}
    if not isinstance(found, dict) or not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}: expected `key: value` lines, got a {type(found).__name__}")
    known = list(known)
    seen: set[str] = set()
    for key_node, _ in node.value:
        key, place = str(key_node.value), f"{path}, line {key_node.start_mark.line + 1}"
        if key not in known:
            raise ConfigError(f"{place}: unknown key {key}{nearest(key, known)}")
        if key in seen:
            raise ConfigError(f"{place}: the key {key} is there twice")
        seen.add(key)
    return found


def _read_environment(settings: type[BaseSettings]) -> dict[str, Any]:
    known = {f"{ENV_PREFIX}{name.upper()}": name for name in settings.model_fields}
    for variable in os.environ:
        if variable.upper().startswith(GUARDED_ENV_PREFIX) and variable.upper() not in known:
            raise ConfigError(f"unknown environment variable {variable}{nearest(variable.upper(), known)}")
    try:
        return dict(EnvSettingsSource(settings, env_parse_none_str="null")())
    except ValueError as error:  # a list or mapping that is not JSON; the error names the field
        raise ConfigError(f"environment: {error} (lists and mappings are written as JSON)") from None


def _refuse_unknown(names: Iterable[str], known: Mapping[str, object], what: str) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown {what} {name}{nearest(name, known)}")


def _explain(error: ValidationError, sources: Mapping[str, str]) -> str:
    parts = []
    for problem in error.errors():
        name = ".".join(map(str, problem["loc"]))
        source = sources.get(str(problem["loc"][0]), "argument")
        parts.append(f"{name} ({source}): {problem['msg']}{_given(problem.get('input'))}")
    return "; ".join(parts)


def _given(value: object) -> str:
    return f", got {value!r}" if isinstance(value, (str, int, float, bool)) else ""
