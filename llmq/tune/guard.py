"""What a sweep may cost: said before it begins, and stopped hard at a cap."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields

from llmq.core import Rate
from llmq.errors import ConfigError, LLMQError
from llmq.ledger import BudgetEvent, Ledger, Price
from llmq.records import AttemptRecord
from llmq.waiters import clock
from llmq.words import money, number


class Stopped(LLMQError):
    """A sweep met one of its caps. What it measured by then is kept."""


@dataclass(frozen=True, slots=True)
class Caps:
    """The most that a sweep may use: attempts, tokens (prompts and answers), USD, minutes. None: no bound.

    No attempt starts beyond `calls`; only with the flag off (`verify`) an ungated stage of a pipeline counts as one,
    whatever it sends or retries itself. Tokens and cost are known only after a call: those in flight overrun them, and
    those that are cancelled at the end of a window tell none.
    Raises ConfigError.
    """

    calls: int | None = None
    tokens: int | None = None
    cost: float | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not (isinstance(value, (int, float)) and 0 < value < math.inf):
                raise ConfigError(f"the cap on {field.name} must be more than 0 and finite, got {value!r}")

    def __str__(self) -> str:
        return " or ".join(_amount(name, value) for name, value in asdict(self).items() if value) or "no cap"


def _amount(name: str, value: float) -> str:
    match name:
        case "cost":
            return f"{money(value)} USD"
        case "minutes":
            return f"{number(value)} minutes"
        case _:
            return f"{value:.0f} {name}"


def checked_caps(caps: object) -> Caps:
    """The caps that were given; None is none. Raises ConfigError for anything else."""
    if caps is None:
        return Caps()
    if not isinstance(caps, Caps):
        raise ConfigError(f"caps are llmq.tune.guard.Caps(calls=500, cost=2.0, ...), got {caps!r}; None for no cap")
    return caps


@dataclass(frozen=True, slots=True)
class Prediction:
    """The most that a sweep is expected to use.

    `tokens` and `cost` None: no call has told any, or its model has no price. `virtual`: the minutes are of a virtual
    clock.
    """

    calls: int
    minutes: float
    tokens: int | None = None
    cost: float | None = None
    virtual: bool = False

    def __str__(self) -> str:
        parts = [f"up to about {self.calls} calls", f"{self.minutes:.1f} {'virtual ' if self.virtual else ''}minutes"]
        if self.tokens is not None:
            parts.append(f"{self.tokens} tokens")
        if self.cost is not None:
            parts.append(f"{money(self.cost)} USD")
        return ", ".join(parts)


EXTRA_SHARE = 2.0
"""What windows that the sweep adds by itself may take in real time, as a share of those that were asked for."""

EXTRA_WINDOWS = 12
"""How many windows it may add at most in real time."""

VIRTUAL_EXTRA_WINDOWS = 30
"""The same in virtual time, whose seconds cost nothing."""

LEAST_EXTRA_SECONDS = 30.0
"""What they may take in real time, however little was asked for."""

CLEAN_SECONDS = (60.0, 300.0)
"""How long an answer is held at least, and at most, where nothing was refused at all."""

WARM_UP_SECONDS = 2.0
"""What the warm-up takes at least."""


@dataclass(frozen=True, slots=True)
class Extra:
    """What a sweep may still add by itself: windows, and seconds for them. `clean_calls`: up to how many calls the
    answer is held for longer than the least of `CLEAN_SECONDS`; `coarseness`: how far above the smallest level the
    answer may be, as a share."""

    windows: int
    seconds: float = math.inf
    clean_calls: int = 0
    coarseness: float = 0.1

    @classmethod
    def left(cls, windows: int, asked_seconds: float, extra_seconds: float, *, virtual: bool) -> Extra:
        """After so many windows that took `extra_seconds`, and levels asked for that took `asked_seconds`."""
        if virtual:
            return cls(VIRTUAL_EXTRA_WINDOWS - windows, clean_calls=10_000, coarseness=0.02)
        return cls(EXTRA_WINDOWS - windows, most_extra_seconds(asked_seconds) - extra_seconds)


def most_extra_seconds(asked_seconds: float) -> float:
    """How long a sweep may go on in real time after the levels that were asked for."""
    return max(LEAST_EXTRA_SECONDS, EXTRA_SHARE * asked_seconds)


def predict(
    levels: Sequence[int],
    *,
    service_seconds: float,
    window_seconds: float,
    window_calls: int = 0,
    rate_per_second: float | None = None,
    tokens_per_call: float | None = None,
    cost_per_call: float | None = None,
    refine: bool = True,
    virtual: bool = False,
) -> Prediction:
    """The most that a sweep over levels will use: each level once, the first again, and to `refine` what it may add.
    `virtual`: on a virtual clock, where that is bounded in windows and not in time.

    A level N brings N / service_seconds calls a second (Little's law), or the rate that is known. The warm-up is at the
    highest.
    """
    warm_up_seconds = max(WARM_UP_SECONDS, window_seconds)
    warm_up_calls = warm_up_seconds * min(max(levels) / service_seconds, rate_per_second or math.inf)
    calls = seconds = 0.0
    for level in [*levels, levels[0]]:
        per_second = min(level / service_seconds, rate_per_second or math.inf)
        lasts = max(window_seconds, window_calls / per_second) + 2 * service_seconds
        seconds += lasts
        calls += lasts * per_second
    extra = VIRTUAL_EXTRA_WINDOWS / (len(levels) + 1) if virtual else most_extra_seconds(seconds) / seconds
    more = 1 + extra if refine else 1.0
    calls, seconds = calls * more + warm_up_calls, seconds * more + warm_up_seconds
    return Prediction(
        math.ceil(calls),
        seconds / 60,
        None if tokens_per_call is None else round(calls * tokens_per_call),
        None if cost_per_call is None else calls * cost_per_call,
        virtual,
    )


_NO_TOKENS = "no call has told its tokens; return the provider's answer with its usage, or call llmq.report_tokens"
_NO_PRICE = "not every model that answered has a price; add it to the setting llm_prices, or to prices="


class Used(Ledger):
    """What a sweep has used so far, against its caps. The ledger of all its windows' queues."""

    def __init__(self, caps: Caps, prices: Mapping[str, Price]) -> None:
        super().__init__(prices)
        self.caps = caps
        self.calls = 0
        self.tokens = 0
        self.cost = 0.0
        self._began_at = clock()
        self.ends_at = math.inf if caps.minutes is None else self._began_at + 60 * caps.minutes
        self._told = 0
        self._priced = 0

    def add_attempt(self, record: AttemptRecord) -> tuple[BudgetEvent, ...]:
        """Count an attempt."""
        self.calls += record.started_at is not None
        if record.input_tokens is not None or record.output_tokens is not None:
            self._told += 1
            tokens = (record.input_tokens or 0, record.output_tokens or 0)
            self.tokens += sum(tokens)
            price = self.prices.get(record.model_name or record.response_model or "")
            if price is not None:
                self._priced += 1
                self.cost += price.cost_usd(*tokens)
        return ()

    def limits(self) -> Iterator[Rate]:
        """What holds a window's queue to the calls that are left: a burst that hardly refills."""
        if self.caps.calls is not None:
            yield Rate(1e-6, per="day", burst=max(0, self.caps.calls - self.calls))

    @property
    def left_calls(self) -> float:
        """How many more may start."""
        return math.inf if self.caps.calls is None else self.caps.calls - self.calls

    def left(self) -> Caps | None:
        """What is left of the caps, for what follows the sweep; None where nothing is left of one of them."""
        caps = self.caps
        minutes = None if caps.minutes is None else caps.minutes - self.minutes
        if self.at_cap() is not None or (minutes is not None and minutes <= 0):
            return None
        return Caps(
            None if caps.calls is None else caps.calls - self.calls,
            None if caps.tokens is None else caps.tokens - self.tokens,
            None if caps.cost is None else caps.cost - self.cost,
            minutes,
        )

    @property
    def minutes(self) -> float:
        """Since the sweep began."""
        return (clock() - self._began_at) / 60

    @property
    def tokens_per_call(self) -> float | None:
        """On average, of the calls that told them."""
        return self.tokens / self._told if self._told else None

    @property
    def cost_per_call(self) -> float | None:
        """On average in USD; None where not every call that told its tokens has a price."""
        return self.cost / self._priced if self._priced and self._priced == self._told else None

    def at_cap(self) -> str | None:
        """Which cap is met, in words, or None."""
        caps = self.caps
        if caps.calls is not None and self.calls >= caps.calls:
            return _amount("calls", caps.calls)
        if caps.tokens is not None and self.tokens >= caps.tokens:
            return _amount("tokens", caps.tokens)
        if caps.cost is not None and self.cost >= caps.cost:
            return _amount("cost", caps.cost)
        return None

    def check_countable(self) -> None:
        """Raise ConfigError where a cap is on what the calls so far have not told: it would never be met."""
        if self.caps.tokens is not None and self.tokens_per_call is None:
            raise ConfigError(
                f"the cap of {self.caps.tokens} tokens cannot be kept: {_NO_TOKENS}, or cap calls or minutes instead"
            )
        if self.caps.cost is not None and self.cost_per_call is None:
            why = _NO_TOKENS if self.tokens_per_call is None else _NO_PRICE
            raise ConfigError(
                f"the cap of {money(self.caps.cost)} USD cannot be kept: {why}, or cap calls or minutes instead"
            )

    def check_caps(self) -> None:
        """Raise `Stopped` where a cap is met."""
        minutes = self.caps.minutes
        met = _amount("minutes", minutes) if minutes is not None and clock() >= self.ends_at else self.at_cap()
        if met is not None:
            raise Stopped(f"stopped at the cap of {met}")
