"""Rates: requests and tokens in a time.

A rate is a bucket that refills evenly and holds at most `burst`; it is the generic cell rate algorithm (ITU-T I.371)
with the level kept instead of the arrival time. A job starts when the bucket holds what it costs or, where it costs
more than fits in, when the bucket is full; what it takes beyond that is a debt that later jobs wait for. So with no
burst, which is the default, starts are paced evenly, and in any time t at most rate * t + burst is let in, plus the
part of one job that was larger than the bucket, plus what a timer that came late is caught up with: at most a quarter
of a second's worth, and nothing where timers are punctual, as in virtual time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from llmq.core.capacity import check_limits, of
from llmq.core.lanes import CLOCK_JUMP_SECONDS, Claim, Line, Resource

PERIOD_SECONDS = {"second": 1.0, "minute": 60.0, "hour": 3600.0, "day": 86400.0}

_SHY = 1 - 1e-9
"""Of the stated rate, so that rounding never lets one too many into a window."""

_MAX_LATE_SECONDS = 0.25
"""A timer that comes late is caught up with, so that the rate is really reached; after more than this it is not."""

_TOKENS_AHEAD_SECONDS = 0.25
_WEIGHT_OF_NEW = 1 / 8


@dataclass(frozen=True)
class Rate:
    """At most `amount` requests or tokens `per` second, minute, hour or day; in all, or for each value of `by`.

    `burst`: how much may go at once after a rest, in requests or tokens; 0 paces evenly. A server whose bucket is
    one second deep bears one second's worth. See `Cap` for `by` and `overrides`. Raises ValueError and TypeError.

    Tokens are reserved by `LLMTaskMeta.tokens` (without it: by the running mean of what was reported), and settled at
    the end by what was really used.

    >>> Rate(500, per="minute").per_second
    8.333333333333334
    """

    amount: float
    per: Literal["second", "minute", "hour", "day"] = "minute"
    of: Literal["requests", "tokens"] = "requests"
    by: str | None = None
    burst: float = 0
    overrides: Mapping[str | None, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.per not in PERIOD_SECONDS:
            raise ValueError(f"a rate is per {', '.join(PERIOD_SECONDS)}; got per={self.per!r}")
        if self.of not in ("requests", "tokens"):
            raise ValueError(f"a rate is of requests or tokens; got of={self.of!r}")
        check_limits("a rate", self.amount, self.by, self.overrides, least=None)
        if isinstance(self.burst, bool) or not isinstance(self.burst, (int, float)) or not 0 <= self.burst < math.inf:
            raise ValueError(f"a burst is a number of {self.of}, at least 0; got {self.burst!r}")

    @property
    def per_second(self) -> float:
        """The rate of a value without an override, in units a second."""
        return self.amount / PERIOD_SECONDS[self.per]

    def resource(self, key: str | None, line: Line) -> Bucket:
        """What enforces it for one value."""
        return Bucket(key, line, self)


def paces(requests_per_minute: float | None, tokens_per_minute: float | None) -> tuple[Rate, ...]:
    """What holds starts to an even pace, in all; None: no pace.

    Tokens may be ahead by a quarter of a second's worth: what a call is found to have used less than it reserved would
    else be lost whenever nothing is owed.
    """
    found = []
    if requests_per_minute is not None:
        found.append(Rate(requests_per_minute))
    if tokens_per_minute is not None:
        found.append(Rate(tokens_per_minute, of="tokens", burst=tokens_per_minute / 60 * _TOKENS_AHEAD_SECONDS))
    return tuple(found)


class Bucket(Resource):
    """What is left of one rate: `level`, as of `at`."""

    __slots__ = ("_late_at", "_late_level", "at", "burst", "is_selective", "level", "per_second", "rate", "typical")

    def __init__(self, key: str | None, line: Line, rate: Rate) -> None:
        super().__init__(key, line)
        self.rate = rate
        self.per_second = rate.overrides.get(key, rate.amount) / PERIOD_SECONDS[rate.per] * _SHY
        self.burst = float(rate.burst)
        self.is_selective = rate.of == "tokens"
        self.level = self.burst
        self.at = -math.inf
        self.typical = 0.0
        self._late_at = self._late_level = 0.0

    def ready_at(self, tokens: float, now: float) -> float:
        """When the bucket will hold what the job costs, or be full."""
        missing = min(tokens if self.is_selective else 1.0, self.burst) - self.level
        if missing <= 0:
            return now
        return self._since(now) + missing / self.per_second

    def take(self, tokens: float, now: float) -> None:
        """Take what the job costs, into debt if need be."""
        self.advance(now)
        self.level -= tokens if self.is_selective else 1.0

    def give_back(self, claim: Claim, now: float, *, used: float | None, refund: bool) -> None:
        """Settle what was reserved by what was used; a request that was never sent costs nothing."""
        if not self.is_selective:
            if refund:
                self._return(1.0, now)
            return
        if refund:
            used = 0.0
        elif used:
            self.typical += (used - self.typical) * (_WEIGHT_OF_NEW if self.typical else 1.0)
        if used is not None and claim.reserved is not None:
            self._return(claim.reserved - used, now)

    def was_late(self, seconds: float, now: float) -> None:
        """Count the time that the alarm came late, for a start at this very moment."""
        at_the_alarm = self.level + (now - seconds - self.at) * self.per_second
        self._late_at = now
        self._late_level = at_the_alarm + min(seconds, _MAX_LATE_SECONDS) * self.per_second

    def idle(self, now: float) -> bool:
        """Whether the bucket is full."""
        return self.level + max(0.0, now - self._since(now)) * self.per_second >= self.burst

    def why(self, tokens: float, now: float) -> str:
        """Which rate, and how long."""
        seconds = max(0.0, self.ready_at(tokens, now) - now)
        what = f"{self.rate.of} per {self.rate.per}{of(self.rate.by, self.key)}"
        return f"{what}, ready in {seconds:.1f} s"

    def clock_went_back(self, now: float) -> None:
        """Go on from now."""
        self.at = min(self.at, now)

    def carry_over(self, old: Bucket, now: float) -> None:
        """Start from the level of the bucket that this one replaces; the clock may have gone back since."""
        self.at = old._since(now)
        self.level = min(old.level, self.burst)
        self.typical = old.typical

    def _return(self, amount: float, now: float) -> None:
        self.advance(now)
        self.level = min(max(self.burst, self.level), self.level + amount)

    def advance(self, now: float) -> None:
        """Refill up to now."""
        self.at = self._since(now)
        if now <= self.at:
            return
        most = max(self.burst, self._late_level) if self._late_at == now else self.burst
        self.level = min(most, self.level + (now - self.at) * self.per_second)
        self.at = now

    def _since(self, now: float) -> float:
        return self.at if now >= self.at - CLOCK_JUMP_SECONDS else now
