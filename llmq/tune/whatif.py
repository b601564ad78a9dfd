"""What would have been measured at other levels, or under other limits: a recording, swept in virtual time.

Rules
- The provider is the model that `fit` makes of the recording. The sweep, the queue and its retries are the real ones.
- The recorded level is simulated, too, under the limits that were met. How far that is from the recording is the
  stated error. Both are taken in the steady state: of a recording that met a limit on a rate, from its first refusal
  on, for what a rested bucket let in before says nothing about a level.
- Nothing is recommended where that error is unknown, where goodput is off by more than 20 %, or where fewer than 30
  successful calls in the steady state stand behind it.
- Nothing is known of more calls at once than were seen, unless something keeps them from mattering: a rate that was
  met, told in headers or given, a server that works on so many and lets others wait, or a limit on calls at once that
  is not above what was seen. Levels of which nothing is known are not simulated, and never recommended.
- Service times are drawn from the recorded ones in shuffled rounds, so that each round has their very mean.
- A provider decides when a request has arrived. So an attempt is on its way for half of what a refusal took, then it
  is let in or refused, and the answer is on its way for as long.
- The client is as it was (see `fit`). Its timers are late, by anything up to twice the mean: an asyncio loop wakes at
  whole milliseconds. It starts nothing while it is at work on a refusal. What the provider takes is as recorded, where
  all of that is in it, so the provider's own timers are never late. Not every hold is as long as `fit` takes it for, so
  what it reads of a simulation is used to correct it (indirect inference, Gourieroux et al. 1993). Where the simulation
  agrees better with a client that is neither late nor busy, that one is taken.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import random
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from contextvars import Context
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, TypeVarTuple, Unpack

from llmq.errors import ConfigError, ProviderError
from llmq.logs import logger
from llmq.providers.limits import Bucket
from llmq.retry import Retry
from llmq.tune.fit import ConcurrencyLimit, ProviderModel, RateKind, RateLimit, Sample, fit
from llmq.tune.limits import RATES
from llmq.tune.point import Point, Setting, Window, measure
from llmq.tune.recommend import OperatingPoint
from llmq.tune.statistics import percentile
from llmq.tune.sweep import DEFAULT_LEVELS, VIRTUAL_CALLS, Sweep, sweep
from llmq.tune.trace import Trace, most_at_once
from llmq.virtual import VirtualLoop
from llmq.waiters import clock
from llmq.words import number

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
FEWEST_CALLS = 100
IN_FLIGHT_AS_SEEN = 1.05
FEWEST_RECORDED = 30
LARGEST_GOODPUT_ERROR = 0.2


@dataclass(frozen=True, slots=True)
class Agreement:
    """The recorded level, recorded and simulated: goodput is successful calls a second, times are seconds."""

    recorded: Point
    simulated: Point

    @property
    def goodput_error(self) -> float:
        """(simulated - recorded) / recorded."""
        return _relative(self.simulated.goodput, self.recorded.goodput)

    @property
    def p50_error(self) -> float:
        """The same of the median service time."""
        return _relative(self.simulated.service_p50, self.recorded.service_p50)

    @property
    def p95_error(self) -> float:
        """The same of the 95th percentile of the service time."""
        return _relative(self.simulated.service_p95, self.recorded.service_p95)

    @property
    def share_429_error(self) -> float:
        """Simulated minus recorded share of refusals, between -1 and 1."""
        return self.simulated.share_429 - self.recorded.share_429

    def __str__(self) -> str:
        return (
            f"goodput {_percent(self.goodput_error)}, p50 {_percent(self.p50_error)}, p95 {_percent(self.p95_error)}, "
            f"429 share {100 * self.share_429_error:+.1f} points"
        )

    @property
    def worst(self) -> float:
        """The largest of the errors of goodput, p50 and 429 share; infinite where one is not known."""
        errors = (self.goodput_error, self.p50_error, self.share_429_error)
        return max(math.inf if math.isnan(error) else abs(error) for error in errors)

    @property
    def doubt(self) -> str | None:
        """Why the simulation cannot be relied on, or None."""
        if self.recorded.succeeded < FEWEST_RECORDED:
            return (
                f"{self.recorded.succeeded} successful calls in the steady part of the recording are too few to check "
                f"the simulation against; {FEWEST_RECORDED} are needed"
            )
        if any(map(math.isnan, (self.goodput_error, self.p50_error, self.p95_error))):
            return f"how far the simulation is from the recording cannot be told ({self})"
        if abs(self.goodput_error) > LARGEST_GOODPUT_ERROR:
            return (
                f"the simulated goodput differs from the recorded one by {self.goodput_error:+.1%}, and "
                f"{LARGEST_GOODPUT_ERROR:.0%} is the most that is relied on"
            )
        return None


@dataclass(kw_only=True)
class WhatIf(Sweep):
    """A sweep in virtual time over the provider of a recording: its points are of the levels that it knows of.

    `unknown_levels`: the others that were asked for, all above `unknown_above` calls at once; None where all are known.
    `agreement`: the error against the recording. `model`: the provider, as recorded and under the limits given.
    """

    model: ProviderModel
    agreement: Agreement
    unknown_levels: tuple[int, ...] = ()
    unknown_above: int | None = None
    remarks: tuple[str, ...] = field(default=(), repr=False)

    @property
    def frame(self) -> pd.DataFrame:
        """A DataFrame as of `Sweep`, and `known`. Unknown levels come last and have no figures."""
        import pandas as pd

        known = super().frame.assign(known=True)
        unknown = pd.DataFrame({"level": self.unknown_levels, "known": False})
        return pd.concat([known, unknown], ignore_index=True) if self.unknown_levels else known

    def recommend(self) -> OperatingPoint:
        """What to set, as far as the recording knows; no level, and why, where the best may lie above that, or where
        the simulation cannot be relied on."""
        answer = super().recommend() if self.points else OperatingPoint(None, "unknown", "")
        doubt = self.agreement.doubt
        if doubt is not None:
            reason = f"{doubt[0].upper()}{doubt[1:]}."
            advice = "Record more calls: a longer run, with a queue that is never empty."
            answer = OperatingPoint(None, "unknown", reason, next_steps=(advice,))
            if self.unknown_above is not None:
                answer = replace(answer, notes=(self._unknown(),))
        elif self.unknown_above is not None and (answer.level is None or answer.binds in ("latency", "unknown")):
            reason = f"What is best may lie above {self.unknown_above} calls at once. {self._unknown()}"
            advice = f"Record a run at {2 * self.unknown_above} calls at once or more, or give the limits you know of."
            answer = OperatingPoint(None, "unknown", reason, next_steps=(advice,))
        elif self.unknown_above is not None:
            answer = replace(answer, notes=(self._unknown(), *answer.notes))
        return replace(answer, notes=(*answer.notes, self._stated(), *self.remarks))

    def __str__(self) -> str:
        unknown = [f"{level} at once: unknown" for level in self.unknown_levels]
        table = super().__str__() if self.points else ""
        known = [f"Known: {limit}" for limit in self.model.limits]
        return table + "\n".join([*unknown, "", self._stated(), *known]) + "\n"

    def _stated(self) -> str:
        recorded = self.agreement.recorded
        return (
            f"Simulated from a recording at {recorded.level} at once. There the simulation differs from it by: "
            f"{self.agreement}."
        )

    def _unknown(self) -> str:
        return (
            f"Nothing is known of {', '.join(map(str, self.unknown_levels))} at once: no limit was met, told or given, "
            f"and the recording never had more than {self.unknown_above} calls in flight and "
            f"{number(self.model.highest_rate)} calls/s."
        )


class WhatIfOptions(TypedDict, total=False):
    """Of `what_if`. A limit that is given stands in place of one that was met; the rest is as of `llmq.sweep`.

    `calls`: attempts a level at least (2,000).
    """

    requests_per_minute: float | None
    tokens_per_minute: float | None
    max_concurrency: int | None
    slo_p95: float | None
    max_429_ratio: float
    retry: Retry | None
    calls: int
    refine: bool
    seed: int


async def what_if(trace: Trace, levels: Sequence[int] | None = None, **options: Unpack[WhatIfOptions]) -> WhatIf:
    """Sweep `levels` (calls at once) on the provider of a recording, in virtual time.

    Takes a second or two a level, in a thread of its own. Raises `ConfigError` for what cannot be simulated.
    """
    return await asyncio.to_thread(functools.partial(_what_if, trace, levels, **options))


def run_what_if(path: str | Path, levels: Sequence[int] | None = None, **options: Unpack[WhatIfOptions]) -> WhatIf:
    """`what_if` of the trace in a file, from plain code. Also raises `InputError`."""
    return _what_if(Trace.read(path), levels, **options)


def _what_if(
    trace: Trace,
    levels: Sequence[int] | None,
    *,
    requests_per_minute: float | None = None,
    tokens_per_minute: float | None = None,
    max_concurrency: int | None = None,
    slo_p95: float | None = None,
    max_429_ratio: float = 0.01,
    retry: Retry | None = None,
    calls: int = VIRTUAL_CALLS,
    refine: bool = True,
    seed: int = 0,
) -> WhatIf:
    wanted = _checked(DEFAULT_LEVELS if levels is None else levels, calls)
    at_level = _simulated_level(trace)
    recorded = fit(trace)
    if all(sample.failed for samples in recorded.samples.values() for sample in samples):
        raise ConfigError("no call succeeded in this recording, so it says nothing of other levels; record another one")
    if all(sample.seconds <= 0 for samples in recorded.samples.values() for sample in samples if not sample.failed):
        raise ConfigError("all calls in this recording took 0 s (`ended` is `started`); record calls that take time")
    model = with_limits(
        recorded,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        max_concurrency=max_concurrency,
    )
    known = [level for level in wanted if _is_known(model, level)]
    unknown = tuple(level for level in wanted if level not in known)
    title = f"what if, from a recording of {len(trace.attempts)} attempts at {trace.level} at once"
    swept = functools.partial(
        _swept, calls=calls, retry=retry, seed=seed, slo_p95=slo_p95, max_429_ratio=max_429_ratio, title=title
    )
    again = swept(recorded, [at_level], refine=False)
    steady = _steady_point(trace)
    agreement = Agreement(steady, again.judged()[0])
    if recorded.late_seconds > 0 or recorded.busy_seconds > 0:
        tried = []
        for late, busy in ((_corrected(recorded.late_seconds, again, at_level), recorded.busy_seconds), (0.0, 0.0)):
            again = swept(replace(recorded, late_seconds=late, busy_seconds=busy), [at_level], refine=False)
            tried.append((Agreement(steady, again.judged()[0]), late, busy))
        agreement, late, busy = min(tried, key=lambda each: each[0].worst)
        model = replace(model, late_seconds=late, busy_seconds=busy)
    found = swept(model, known, refine=refine) if known else replace(again, points=[], records={})
    return WhatIf(
        **{each.name: getattr(found, each.name) for each in fields(Sweep)},
        model=model,
        agreement=agreement,
        unknown_levels=unknown,
        unknown_above=model.highest_in_flight if unknown else None,
        remarks=(*model.notes, *_remarks(model, agreement, found.points)),
    )


def _corrected(late_seconds: float, simulated: Sweep, level: int) -> float:
    """How late the client was, less what `fit` reads too much of it: as much as it does of a simulation with that."""
    records = simulated.records[simulated.judged()[0].order]
    return max(0.0, 2.0 * late_seconds - fit(Trace.from_records(records, level)).late_seconds)


def _swept(model: ProviderModel, levels: Sequence[int], *, seed: int, **options: Any) -> Sweep:
    async def run() -> Sweep:
        provider = FittedProvider(model, seed=seed)
        questions = provider.questions()
        return await sweep(
            provider.answer, questions, levels, virtual=True, seed=seed, on_progress=lambda _: None, **options
        )

    with _without_log(), asyncio.Runner(loop_factory=lambda: ClientLoop(model.late_seconds, seed)) as runner:
        return runner.run(run())


@contextmanager
def _without_log() -> Iterator[None]:
    """llmq logs nothing of what is only simulated, in this thread."""
    thread = threading.get_ident()

    def elsewhere(record: logging.LogRecord) -> bool:
        return record.thread != thread

    logger.addFilter(elsewhere)
    try:
        yield
    finally:
        logger.removeFilter(elsewhere)


class ClientLoop(VirtualLoop):
    """The virtual loop of a client whose timers are late, by up to twice the mean; `on_time` is for who is not it."""

    def __init__(self, late_seconds: float, seed: int) -> None:
        self._longest_seconds = 2.0 * late_seconds
        self._rng = random.Random(seed)
        super().__init__()

    def call_at(
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """As of any loop, and late."""
        return super().call_at(when + self._longest_seconds * self._rng.random(), callback, *args, context=context)

    async def on_time(self, seconds: float) -> None:
        """Sleep as `asyncio.sleep`, and wake when it is over."""
        over = self.create_future()
        timer = super().call_at(self.time() + seconds, _wake, over)
        try:
            await over
        finally:
            timer.cancel()


def _wake(over: asyncio.Future[None]) -> None:
    if not over.done():
        over.set_result(None)


def with_limits(
    model: ProviderModel,
    *,
    requests_per_minute: float | None = None,
    tokens_per_minute: float | None = None,
    max_concurrency: int | None = None,
) -> ProviderModel:
    """A model under given limits in place of those that were met.

    A given rate comes with a bucket as many seconds deep as the recorded one; of a minute, where none was.
    Raises `ConfigError`, also for a rate that lets in less than one call a minute.
    """
    rates = {rate.kind: rate for rate in model.rates}
    given: tuple[tuple[RateKind, float | None], ...] = (
        ("requests", requests_per_minute),
        ("tokens", tokens_per_minute),
    )
    for kind, per_minute in given:
        if per_minute is None:
            continue
        if not 0 < per_minute < math.inf:
            raise ConfigError(f"{kind}_per_minute must be more than 0 and finite, got {per_minute}")
        known = rates.get(kind)
        seconds = 60.0 if known is None else known.depth / known.per_minute * 60.0
        depth = max(1.0, per_minute / 60.0 * seconds)
        whose = "a minute's worth" if known is None else f"{number(seconds)} s' worth as recorded"
        rates[kind] = RateLimit(kind, per_minute, depth, "given", f", its bucket holds {whose}", kind)
    concurrency = model.concurrency
    if max_concurrency is not None:
        if max_concurrency < 1:
            raise ConfigError(f"max_concurrency must be at least 1, got {max_concurrency}")
        concurrency = ConcurrencyLimit(max_concurrency, "given", "", "concurrency")
    samples = [sample for each in model.samples.values() for sample in each]
    if "tokens" in rates and not any(sample.tokens for sample in samples):
        raise ConfigError("the recording has no tokens, so a limit on tokens cannot be simulated; wrap the client")
    for kind, per_minute in given:
        call = 1.0 if kind == "requests" else statistics.fmean(sample.tokens for sample in samples or (Sample(0, 0),))
        if per_minute is not None and per_minute < call:
            raise ConfigError(
                f"{kind}_per_minute={number(per_minute)} lets in less than one call a minute, a call is "
                f"{number(call, 4)} {kind}; give a higher limit"
            )
    return replace(model, rates=tuple(rates.values()), concurrency=concurrency)


@dataclass(slots=True)
class Question:
    """One call. What it is like when it is let in is drawn once, however often it is refused before."""

    stage: str | None
    drawn: Sample | None = None


class FittedProvider:
    """A provider in this process that behaves as the model says, from empty buckets. On a `ClientLoop`.

    `sweep(provider.answer, provider.questions(), ...)`
    """

    def __init__(self, model: ProviderModel, *, seed: int) -> None:
        self._model = model
        self._rng = random.Random(seed)
        self._samples = {stage: _rounds(samples, self._rng) for stage, samples in model.samples.items()}
        self._transits = _rounds([seconds / 2 for seconds in model.refusal_seconds or (0.0,)], self._rng)
        slots = model.server_slots
        self._slot: AbstractAsyncContextManager[None] = (
            nullcontext() if slots is None else asyncio.Semaphore(slots.slots)
        )
        self._buckets: list[tuple[RateLimit, Bucket]] | None = None
        self._in_flight = 0

    def questions(self) -> Iterator[Question]:
        """What to ask, without end: the stages as often as they were recorded."""
        stages = [stage for stage, samples in self._model.samples.items() for _ in samples]
        return (Question(stage) for stage in _rounds(stages, self._rng))

    async def answer(self, question: Question) -> None:
        """Let in or refuse. Raises `ProviderError`."""
        loop = asyncio.get_running_loop()
        assert isinstance(loop, ClientLoop)
        transit = next(self._transits)
        await loop.on_time(transit)
        sample = question.drawn = question.drawn or next(self._samples[question.stage])
        refusal = self._refusal(sample.tokens, clock())
        if refusal is not None:
            busy = min(transit, self._model.busy_seconds)
            await loop.on_time(transit - busy)
            loop.jump(busy)
            raise refusal
        question.drawn = None
        self._in_flight += 1
        try:
            async with self._slot:
                await loop.on_time(max(0.0, sample.seconds - transit))
        finally:
            self._in_flight -= 1
        if sample.failed:
            raise ProviderError(
                "failed as recorded", status_code=sample.status_code, connection_lost=sample.status_code is None
            )

    def _refusal(self, tokens: int, now: float) -> ProviderError | None:
        """Take what a call needs, or say why it is refused."""
        limit = self._model.concurrency
        if limit is not None and self._in_flight >= limit.calls:
            return self._refused(limit.says, 1.0)
        if self._buckets is None:
            self._buckets = [(rate, _empty(rate, now)) for rate in self._model.rates]
        needs = [(rate, bucket, 1 if rate.kind == "requests" else tokens) for rate, bucket in self._buckets]
        waits = [(bucket.seconds_until(amount, now), rate.says) for rate, bucket, amount in needs]
        longest = max(waits, default=(0.0, ""))
        if longest[0] > 0:
            return self._refused(longest[1], longest[0])
        for _, bucket, amount in needs:
            bucket.take(amount, now)
        return None

    def _refused(self, says: str, wait_seconds: float) -> ProviderError:
        told = self._model.retry_after
        headers = {}
        if told == "whole":
            headers["retry-after"] = str(math.ceil(wait_seconds))
        elif told != "none":
            headers["retry-after-ms"] = str(math.ceil(1000.0 * (wait_seconds if told == "exact" else told)))
        return ProviderError(f"refused by {says}", status_code=429, headers=headers, body={"type": says})


def _empty(rate: RateLimit, now: float) -> Bucket:
    bucket = Bucket(rate.per_minute, rate.depth * 60.0 / rate.per_minute, now)
    bucket.take(bucket.depth, now)
    return bucket


def _rounds(values: Sequence[T], rng: random.Random) -> Iterator[T]:
    """The values over and over, each round in another order."""
    shuffled = list(values)
    while True:
        rng.shuffle(shuffled)
        yield from shuffled


# The recording


def _steady_point(trace: Trace) -> Point:
    """A recording as a point: from one median service time after the first start to the last start.

    Where a limit on a rate refused, from the first refusal on: the bucket was empty from then on.
    """
    records = trace.to_records()
    started = [a for a in records.attempts if a.started_at is not None]
    starts = [a.started_at for a in started if a.started_at is not None]
    typical = percentile([a.ended_at - at for a, at in zip(started, starts, strict=True)], 0.5) or 0.0
    refused = [a.ended_at for a in started if a.outcome == "rejected" and (a.limit_type or "unknown") in RATES]
    first, last = min(starts), max(starts)
    start = max(first + typical, min(refused, default=first))
    if start >= last:
        start = first
    return measure(Setting(trace.level), records, Window(start, last, start - first))


def _simulated_level(trace: Trace) -> int:
    """At which the recording is simulated: its own, or a little more than was in flight where that is less."""
    most = most_at_once(trace.attempts)
    if trace.level < most:
        raise ConfigError(
            f"the recording says level={trace.level}, and {most} calls were in flight at once; write it with "
            f"level={most} or more, the calls at once that were allowed"
        )
    return min(trace.level, 1 << max(0, most - 1).bit_length())


def _is_known(model: ProviderModel, level: int) -> bool:
    if model.rates or model.server_slots is not None:
        return True
    at_once = level if model.concurrency is None else min(level, model.concurrency.calls)
    return at_once <= model.highest_in_flight


def _remarks(model: ProviderModel, agreement: Agreement, points: Sequence[Point]) -> Iterator[str]:
    recorded = agreement.recorded
    if agreement.simulated.refused and not recorded.refused:
        yield (
            "The recording met no refusal, while in the long run there are some at its level: it lived on what a "
            "rested bucket held. So the error stated is not one of the model; record for longer to know that."
        )
    if recorded.limited_by == "pipeline":
        yield (
            f"The recording had {number(recorded.in_flight)} calls in flight of the {recorded.level} allowed: its own "
            "pace was the limit, while here the queue is never empty."
        )
    most = max((point.in_flight for point in points), default=0.0)
    if model.concurrency is None and most > IN_FLIGHT_AS_SEEN * model.highest_in_flight:
        yield (
            f"Up to {number(most)} calls in flight were simulated, {model.highest_in_flight} were seen: a limit on "
            "calls at once between the two would not have shown."
        )


def _checked(levels: Sequence[int], calls: int) -> list[int]:
    if not levels or any(type(level) is not int or level < 1 for level in levels):
        raise ConfigError(f"levels are calls at once, whole numbers, each at least 1; got {levels!r}")
    if calls < FEWEST_CALLS:
        raise ConfigError(f"calls={calls} are too few to simulate a level; ask for {FEWEST_CALLS} or more")
    return sorted(set(levels))


def _relative(simulated: float | None, recorded: float | None) -> float:
    return (simulated - recorded) / recorded if simulated is not None and recorded else math.nan


def _percent(error: float) -> str:
    return "unknown" if math.isnan(error) else f"{error:+.1%}"
