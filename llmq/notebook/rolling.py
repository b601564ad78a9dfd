"""Figures of the last minute, from a queue's records as they come. Pure but for `Reader`, which asks the queue.

- What ends is counted into bins of a second, of which there are 60; so a figure costs the same after 100,000 calls.
- Percentiles are those of the newest 1,000 calls at most, and of the newest 200 of a stage.
- Each record is read once: the queue is asked for what is new (`records_since`).
- `explain` looks at all who wait, so it is asked at most once a second, and less often where it takes long.
- The reader holds no reference to the queue, so that it does not keep it alive.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import quantiles
from typing import TYPE_CHECKING

from llmq.waiters import clock

if TYPE_CHECKING:
    from llmq.queue import LLMQueue, QueueState
    from llmq.records import AttemptRecord, OperationRecord, Records

SECONDS = 60
"""How long a record counts."""
RATE_SECONDS = 10
"""Over which a rate is taken: short, so that it follows the slider."""
MOST_CALLS = 1000
MOST_STAGE_CALLS = 200
MOST_STAGES = 50
OTHER_STAGES = "all others"
EXPLAIN_SHARE = 50
"""`explain` is asked again after so many times as long as it took, and after a second at least."""

Percentiles = tuple[float | None, float | None]
"""Median and p95, in seconds."""


@dataclass(frozen=True, slots=True)
class StageFigures:
    """One stage, since the panel began to look: calls that succeeded and failed, attempts refused, time in the slot."""

    stage: str
    succeeded: int
    failed: int
    refused: int
    service: Percentiles


@dataclass(frozen=True, slots=True)
class Figures:
    """What a panel shows. Rates are of the last 10 s, shares, times and tokens of the last minute.

    `goodput` in successful calls a second; `share_429` of the attempts, `refusals` the same by the limit that refused.
    `tokens_per_minute` is None where no call told its tokens. `lines` are the values of the last 60 s, oldest first.
    """

    state: QueueState
    in_flight: int
    waiting: int
    limit: int
    why: str
    goodput: float
    share_429: float
    refusals: dict[str, float]
    wait: Percentiles
    service: Percentiles
    tokens_per_minute: int | None
    lines: dict[str, tuple[float, ...]]
    stages: tuple[StageFigures, ...]


@dataclass(slots=True)
class _Second:
    succeeded: int = 0
    attempts: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    tokens: int | None = None
    in_flight: int = 0
    waiting: int = 0


_NOTHING = _Second()


@dataclass(slots=True)
class _Stage:
    succeeded: int = 0
    failed: int = 0
    refused: int = 0
    service: deque[float] = field(default_factory=lambda: deque(maxlen=MOST_STAGE_CALLS))


class Rolling:
    """Counts by second, and by stage."""

    def __init__(self) -> None:
        self._bins: dict[int, _Second] = {}
        self._waits: deque[tuple[float, float]] = deque(maxlen=MOST_CALLS)
        self._service: deque[tuple[float, float]] = deque(maxlen=MOST_CALLS)
        self._stages: dict[str | None, _Stage] = {}
        self._began = math.inf

    def add(self, records: Records, now: float) -> None:
        """Count what ended; `now` in seconds on the clock of the records."""
        for attempt in records.attempts:
            self._add_attempt(attempt, now)
        for operation in records.operations:
            self._add_operation(operation, now)

    def note(self, in_flight: int, waiting: int, now: float) -> None:
        """Keep a sample of the gauges: the latest of each second."""
        self._began = min(self._began, now)
        second = self._second(now)
        second.in_flight, second.waiting = in_flight, waiting
        for old in [at for at in self._bins if at <= now - SECONDS]:
            del self._bins[old]

    def goodput(self, now: float) -> float:
        """Successful calls a second, over the last 10 s or since the first call."""
        first = math.floor(now) - RATE_SECONDS + 1
        seconds = max(1.0, now - max(first, self._began))
        return sum(each.succeeded for at, each in self._bins.items() if at >= first) / seconds

    def refusals(self) -> tuple[float, dict[str, float]]:
        """The share of refused attempts in the last minute, in all and by limit."""
        attempts = sum(each.attempts for each in self._bins.values())
        by_limit: Counter[str] = sum((each.refused for each in self._bins.values()), Counter())
        if not attempts:
            return 0.0, {}
        return by_limit.total() / attempts, {limit: n / attempts for limit, n in by_limit.most_common()}

    def tokens(self) -> int | None:
        """Tokens of the last minute, None where nobody told any."""
        told = [each.tokens for each in self._bins.values() if each.tokens is not None]
        return sum(told) if told else None

    def times(self, now: float) -> tuple[Percentiles, Percentiles]:
        """Of waiting and of service."""
        return _percentiles(_recent(self._waits, now)), _percentiles(_recent(self._service, now))

    def lines(self, now: float) -> dict[str, tuple[float, ...]]:
        """A value a second for the last minute, the present second left out, since it is not over."""
        last = math.floor(now)
        seconds = [self._bins.get(at, _NOTHING) for at in range(last - SECONDS + 1, last)]
        return {
            "in flight": tuple(float(each.in_flight) for each in seconds),
            "waiting": tuple(float(each.waiting) for each in seconds),
            "successful calls/s": tuple(float(each.succeeded) for each in seconds),
            "429s/s": tuple(float(each.refused.total()) for each in seconds),
        }

    def stages(self) -> tuple[StageFigures, ...]:
        """Of the stages in order of their first record; empty where no call has one."""
        if not self._stages.keys() - {None}:
            return ()
        return tuple(
            StageFigures(
                "(none)" if name is None else name, s.succeeded, s.failed, s.refused, _percentiles(list(s.service))
            )
            for name, s in self._stages.items()
        )

    def _add_attempt(self, attempt: AttemptRecord, now: float) -> None:
        if attempt.started_at is None:  # it never left
            return
        second, stage = self._second(min(attempt.ended_at, now)), self._stage(attempt.stage)
        self._began = min(self._began, attempt.submitted_at)
        second.attempts += 1
        if attempt.outcome == "rejected":
            second.refused[attempt.limit_type or "unknown"] += 1
            stage.refused += 1
        elif attempt.outcome == "ok":
            seconds = attempt.ended_at - attempt.started_at
            self._service.append((attempt.ended_at, seconds))
            stage.service.append(seconds)
        if attempt.input_tokens is not None or attempt.output_tokens is not None:
            second.tokens = (second.tokens or 0) + (attempt.input_tokens or 0) + (attempt.output_tokens or 0)

    def _add_operation(self, operation: OperationRecord, now: float) -> None:
        self._waits.append((operation.ended_at, operation.wait_seconds))
        stage = self._stage(operation.stage)
        if operation.outcome == "ok":
            self._second(min(operation.ended_at, now)).succeeded += 1
            stage.succeeded += 1
        elif operation.outcome != "cancelled":
            stage.failed += 1

    def _second(self, at: float) -> _Second:
        return self._bins.setdefault(math.floor(at), _Second())

    def _stage(self, name: str | None) -> _Stage:
        if name not in self._stages and len(self._stages) >= MOST_STAGES:
            name = OTHER_STAGES
        return self._stages.setdefault(name, _Stage())


class Reader:
    """Reads one queue again and again, each time only what is new."""

    def __init__(self) -> None:
        self._rolling = Rolling()
        self._mark: object = None
        self._why = ""
        self._state = ""
        self._ask_at = 0.0

    def read(self, queue: LLMQueue) -> Figures:
        """The figures now."""
        now = clock()
        records, self._mark = queue.records_since(self._mark)
        found = queue.statistics()
        rolling, waiting = self._rolling, found.waiting + found.at_door
        rolling.add(records, now)
        rolling.note(found.in_flight, waiting, now)
        wait, service = rolling.times(now)
        share, refusals = rolling.refusals()
        return Figures(
            queue.state,
            found.in_flight,
            waiting,
            found.limit,
            self._explained(queue, found.oldest_wait_seconds),
            rolling.goodput(now),
            share,
            refusals,
            wait,
            service,
            rolling.tokens(),
            rolling.lines(now),
            rolling.stages(),
        )

    def _explained(self, queue: LLMQueue, oldest_wait_seconds: float | None) -> str:
        if oldest_wait_seconds is None:
            self._ask_at = 0.0
            return "Nothing waits."
        began = time.monotonic()
        state = queue.state
        if began >= self._ask_at or state != self._state:
            self._state, self._why = state, queue.explain()
            took = time.monotonic() - began
            self._ask_at = began + max(1.0, EXPLAIN_SHARE * took)
        return f"The oldest waiter, for {oldest_wait_seconds:.0f} s: {self._why}."


def _recent(values: Iterable[tuple[float, float]], now: float) -> list[float]:
    return [seconds for at, seconds in values if at > now - SECONDS]


def _percentiles(values: list[float]) -> Percentiles:
    if len(values) < 2:
        return (values[0], values[0]) if values else (None, None)
    twentieths = quantiles(values, n=20, method="inclusive")
    return twentieths[9], twentieths[18]
