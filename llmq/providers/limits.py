"""The simulated provider's limits: requests and tokens in a time, and a cap on what runs at once.

Pure, time is an argument.

- A limit in a time is a bucket or a window. A bucket holds up to `bucket_seconds` of its nominal rate and refills
  continuously. A window is `bucket_seconds` long and holds that much of its rate. Fixed windows follow one another
  from the first request on; a sliding window is the last `bucket_seconds` at any moment.
- The rate changes in steps: the nominal one times each of `limit_factors` in turn. A bucket fills by the integral of
  the rate; a window holds what the rate of the moment allows.
- A request that does not fit is refused and takes nothing. One that is larger than the whole limit fits when nothing
  is used.
- The seconds until something fits are true, if nobody else comes: for each limit by itself, and the longest is told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal, Protocol

from llmq.providers.spec import ProviderSpec

LimitType = Literal["requests", "tokens", "concurrency", "random"]

_TINY_AMOUNT = 1e-9
_TINY_SECONDS = 1e-6


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a request was turned away, and in how many seconds it would have fitted (None: nobody knows)."""

    limit_type: LimitType
    retry_after_seconds: float | None


@dataclass(frozen=True, slots=True)
class LimitState:
    """One limit at a moment: what it is, what is left of it, and in how many seconds all of it would be."""

    kind: LimitType
    limit: float
    remaining: float
    reset_seconds: float


class Rate:
    """Units a second that change in steps: `per_minute / 60` times each factor in turn, from `start` on."""

    def __init__(
        self, per_minute: float, factors: tuple[float, ...] = (1.0,), factor_seconds: float = 60.0, start: float = 0.0
    ) -> None:
        self.nominal = per_minute / 60.0
        self.start = start
        self._steps = [self.nominal * factor for factor in factors]
        self._step_seconds = factor_seconds
        self._cycle_seconds = factor_seconds * len(factors)
        self._per_cycle = sum(self._steps) * factor_seconds

    def at(self, now: float) -> float:
        """The rate at `now`."""
        return self._steps[0] if len(self._steps) == 1 else next(self._pieces(now))[1]

    def amount(self, start: float, end: float) -> float:
        """The integral of the rate from `start` to `end`."""
        seconds = end - start
        if len(self._steps) == 1:
            return seconds * self._steps[0]
        cycles = max(0.0, seconds // self._cycle_seconds)
        seconds -= cycles * self._cycle_seconds
        total = cycles * self._per_cycle
        for piece_seconds, rate in self._pieces(start):
            total += min(piece_seconds, seconds) * rate
            seconds -= piece_seconds
            if seconds <= 0:
                break
        return total

    def seconds_for(self, amount: float, now: float) -> float:
        """How long from `now` until the integral of the rate is `amount`."""
        if len(self._steps) == 1:
            return amount / self._steps[0]
        cycles = amount // self._per_cycle
        amount -= cycles * self._per_cycle
        seconds = cycles * self._cycle_seconds
        for piece_seconds, rate in self._pieces(now):
            if amount <= piece_seconds * rate:
                return seconds + amount / rate
            amount -= piece_seconds * rate
            seconds += piece_seconds
        raise AssertionError("a rate has no end")

    def steps(self, start: float, end: float) -> Iterator[tuple[float, float]]:
        """(time, rate) at `start` and at each change before `end`; each rate at most twice, later ones repeat."""
        time = start
        for piece_seconds, rate in islice(self._pieces(start), len(self._steps) + 1):
            if time < end:
                yield time, rate
            time += piece_seconds

    def _pieces(self, now: float) -> Iterator[tuple[float, float]]:
        """(seconds, rate) of the current step's rest and of all that follow, without end."""
        index, gone = divmod((now - self.start) % self._cycle_seconds, self._step_seconds)
        number, left = int(index), self._step_seconds - gone
        if left < _TINY_SECONDS:  # the step is over, but for rounding
            number, left = number + 1, left + self._step_seconds
        while True:
            yield left, self._steps[number % len(self._steps)]
            number, left = number + 1, self._step_seconds


class Meter(Protocol):
    """One limit in a time."""

    def seconds_until(self, amount: float, now: float) -> float:
        """Until `amount` fits, 0 if it does; more than the whole limit fits when nothing of it is used."""

    def take(self, amount: float, now: float) -> None:
        """Take `amount`, whether it fits or not."""

    def state(self, kind: LimitType, now: float) -> LimitState:
        """What headers tell of it."""


class Bucket:
    """Units, refilled at a rate up to `depth`, which follows from the nominal rate; starts full."""

    def __init__(self, per_minute: float, depth_seconds: float, now: float, rate: Rate | None = None) -> None:
        self.rate = rate or Rate(per_minute)
        self.per_minute = per_minute
        self.depth = max(1.0, self.rate.nominal * depth_seconds)
        self._level = self.depth
        self._as_of = now

    def level(self, now: float) -> float:
        """What is in the bucket at `now`."""
        return min(self.depth, self._level + self.rate.amount(self._as_of, now))

    def seconds_until(self, amount: float, now: float) -> float:
        """Until `amount` fits; more than the whole depth fits when the bucket is full."""
        missing = min(amount, self.depth) - self.level(now)
        return 0.0 if missing <= _TINY_AMOUNT else self.rate.seconds_for(missing, now)

    def take(self, amount: float, now: float) -> None:
        """Take `amount`, into debt if it must be."""
        self._level = self.level(now) - amount
        self._as_of = now

    def state(self, kind: LimitType, now: float) -> LimitState:
        """Limit per minute; reset when full."""
        level = self.level(now)
        per_minute = self.per_minute * (self.rate.at(now) / self.rate.nominal)
        return LimitState(kind, per_minute, max(0.0, level), self.rate.seconds_for(self.depth - level, now))


class Window:
    """What was taken in the last `seconds` (sliding), or since the current fixed window began."""

    def __init__(self, rate: Rate, seconds: float, *, sliding: bool) -> None:
        self.rate = rate
        self._seconds = seconds
        self._sliding = sliding
        self._used = 0.0
        self._taken: deque[tuple[float, float]] = deque()
        """(when it no longer counts, amount), in that order."""

    def seconds_until(self, amount: float, now: float) -> float:
        """Until `amount` fits; more than the window holds fits when it is empty."""
        self._forget(now)
        since, used = now, self._used
        for forgotten_at, taken in self._taken:
            for time, rate in self.rate.steps(since, forgotten_at):
                holds = self._holds(rate)
                if used + min(amount, holds) <= holds + _TINY_AMOUNT:
                    return time - now
            since, used = forgotten_at, used - taken
        return since - now

    def take(self, amount: float, now: float) -> None:
        """Take `amount`, whether it fits or not."""
        self._forget(now)
        self._used += amount
        forgotten_at = self._forgotten_at(now)
        if self._taken and self._taken[-1][0] == forgotten_at:
            amount += self._taken.pop()[1]
        self._taken.append((forgotten_at, amount))

    def state(self, kind: LimitType, now: float) -> LimitState:
        """Limit per window; reset when it is empty."""
        self._forget(now)
        holds = self._holds(self.rate.at(now))
        reset = self._taken[-1][0] - now if self._taken else 0.0
        return LimitState(kind, holds, max(0.0, holds - self._used), reset)

    def _holds(self, rate: float) -> float:
        return max(1.0, rate * self._seconds)

    def _forgotten_at(self, now: float) -> float:
        if self._sliding:
            return now + self._seconds
        number = (now - self.rate.start + _TINY_SECONDS) // self._seconds
        return self.rate.start + (number + 1) * self._seconds

    def _forget(self, now: float) -> None:
        while self._taken and self._taken[0][0] <= now + _TINY_SECONDS:
            self._used -= self._taken.popleft()[1]


class Limits:
    """All limits of one provider, from its first request on."""

    def __init__(self, spec: ProviderSpec, now: float) -> None:
        self._max_concurrency = spec.max_concurrency
        self._meters: dict[LimitType, Meter] = {}
        if spec.requests_per_minute is not None:
            self._meters["requests"] = _meter(spec, spec.requests_per_minute, now)
        if spec.tokens_per_minute is not None:
            self._meters["tokens"] = _meter(spec, spec.tokens_per_minute, now)

    def refuses(self, tokens: int, in_flight: int, now: float) -> Refused | None:
        """Take what a request needs, or say why it is refused."""
        if self._max_concurrency is not None and in_flight >= self._max_concurrency:
            return Refused("concurrency", 1.0)
        if not self._meters:
            return None
        needs = {"requests": 1, "tokens": tokens}
        waits = {kind: meter.seconds_until(needs[kind], now) for kind, meter in self._meters.items()}
        longest = max(waits, key=lambda kind: waits[kind])
        if waits[longest] > 0:
            return Refused(longest, waits[longest])
        for kind, meter in self._meters.items():
            meter.take(needs[kind], now)
        return None

    def states(self, now: float) -> tuple[LimitState, ...]:
        """What headers tell of, at `now`."""
        return tuple(meter.state(kind, now) for kind, meter in self._meters.items()) if self._meters else ()


def _meter(spec: ProviderSpec, per_minute: float, now: float) -> Meter:
    rate = Rate(per_minute, spec.limit_factors, spec.factor_seconds, now)
    if spec.window == "bucket":
        return Bucket(per_minute, spec.bucket_seconds, now, rate)
    return Window(rate, spec.bucket_seconds, sliding=spec.window == "sliding")
