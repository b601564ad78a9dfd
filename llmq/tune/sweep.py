"""Measure a provider at several concurrency levels, with the caller's own pipeline or coroutine.

How a sweep goes, and why
- A closed loop keeps each level full through a queue of its own; that queue owns the retries, so refusals are seen.
- First a few calls tell the service time, and a short run at the highest level warms everything up and finds out
  whether a rate limit refuses. Points taken before one was known are kept, and measured again.
- If one does, its bucket is brought to one state before each level: emptied, since a bucket that has rested gives a
  burst that flatters whichever level comes first, then left to refill a little: for one service time, since the first
  calls of a level come all at once, and for three standard deviations of how many calls a window brings, since a
  level right at the limit has ups and downs. What is above the limit by more than that runs dry within its window.
- Levels come in shuffled order, and the first one again last, to see drift.
- Of each level, what happens until it is full and one service time has passed is discarded.
- Then whole levels between the measured ones are added where they would sharpen the answer, and the recommended
  level is measured again for longer: a limit on a rate shows only once its bucket is empty.
- Event-loop lag and CPU tell when this client is the limit, and not the provider.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import math
import random
import time
from collections.abc import AsyncIterable, Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llmq.core import LLMTaskMeta, Outcome
from llmq.errors import ConfigError, ProviderError, QueueHaltedError
from llmq.items import ItemRun
from llmq.pipeline import Pipeline
from llmq.queue import LLMQueue
from llmq.retry import Kind, Retry, Verdict, classify, describe
from llmq.runtime import RuntimeEnv, using
from llmq.tune.point import RATES, Point, Purpose, Window, measure, spread
from llmq.tune.recommend import Bounds, OperatingPoint, drift, next_level, recommend, to_confirm
from llmq.tune.statistics import percentile
from llmq.tune.storage import PointStore
from llmq.virtual import VirtualLoop
from llmq.waiters import clock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import pandas as pd
    from matplotlib.figure import Figure

T = TypeVar("T")

DEFAULT_LEVELS = (1, 2, 4, 8, 16, 32, 64)
MAX_EXTRA = 8
_LOOK_SECONDS = (0.01, 0.25)
_LAG_SECONDS = 0.01
_FEW_CALLS = 8
_ERRORS_TO_GIVE_UP = 3
_FAILURES_TO_GIVE_UP = 8
_EMPTYING_SECONDS = 60.0
_MARGIN_DEVIATIONS = 3.0


@dataclass
class Sweep:
    """What was measured, as it was measured, and what it says."""

    points: list[Point]
    bounds: Bounds = field(default_factory=Bounds)
    title: str = ""
    hidden_retries: bool = False

    @property
    def frame(self) -> pd.DataFrame:
        """A DataFrame, a row a measured level in order of level; the columns are the fields of `Point`."""
        import pandas as pd

        columns = [column.name for column in fields(Point)]
        return pd.DataFrame([asdict(p) for p in self.by_level()], columns=columns)

    def recommend(self) -> OperatingPoint:
        """The level to set, and why."""
        answer = recommend(self.points, self.bounds)
        if not self.hidden_retries:
            return answer
        warning = (
            "Your client retries by itself, so refusals were hidden and the 429 share is not to be trusted: hand its "
            "retries over (llmq.wrap) or switch them off (max_retries=0), and measure again."
        )
        return replace(answer, notes=(warning, *answer.notes))

    def plot(self) -> Figure:
        """One figure: goodput, 429 share, service and wait times against concurrency."""
        from llmq.tune.plots import plot_sweep

        return plot_sweep(self)

    def drift(self) -> float | None:
        """Relative change of goodput from the first level's first measurement to its last."""
        return drift(self.points)

    def __str__(self) -> str:
        from llmq.tune.report import text_table

        return text_table(self)

    def by_level(self) -> list[Point]:
        """All points in order of level, then of time."""
        return sorted(self.points, key=lambda p: (p.level, p.order))


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a sweep is: `done` of about `total` levels, the one being measured, the newest point."""

    done: int
    total: int
    level: int | None
    point: Point | None = None


async def sweep(
    call_or_pipeline: Callable[[T], Awaitable[object]] | Pipeline,
    items: Iterable[T],
    levels: Sequence[int] | None = None,
    *,
    seconds: float | None = None,
    slo_p95: float | None = None,
    max_429_ratio: float = 0.01,
    max_error_ratio: float = 0.01,
    retry: Retry | None = None,
    request_timeout: float | None = None,
    open_items: int | None = None,
    refine: bool = True,
    out: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    title: str = "",
    on_progress: Callable[[Progress], None] | None = None,
) -> Sweep:
    """Measure `call(item)`, or a pipeline over items, at each level (calls at once), and say which to use.

    A list of items is used over and over; an iterator only as long as it lasts. `seconds` is how long each level
    is measured after its warm-up: by default 40 service times, between 2 and 20 s. `slo_p95` bounds the 95th
    percentile of the service time, in seconds. `retry` and `request_timeout` default to the settings in force.
    With `out`, each point is saved there as it is measured, and `resume` goes on with what is there.

    A plain call holds one slot; what it sends through `llmq.submit` itself takes no second one. Runs on asyncio.
    Hand the retries of your own client over (`llmq.wrap`) or switch them off (`max_retries=0`): hidden ones cannot be
    counted.
    Raises what the call raises if nothing but errors of its own comes back, `ProviderError` if no call succeeds, and
    `ConfigError` for what cannot be measured.
    """
    settings = RuntimeEnv.instance().settings
    order = _checked_levels(DEFAULT_LEVELS if levels is None else levels)
    bounds = Bounds(max_429_ratio, max_error_ratio, slo_p95)
    runner = _Runner(
        call_or_pipeline,
        items,
        retry=settings.retry if retry is None else retry,
        request_timeout=settings.request_timeout if request_timeout is None else request_timeout,
        open_items=settings.concurrency if open_items is None else open_items,
        seconds=_positive("seconds", seconds),
        highest=order[-1],
    )
    store = None if out is None else PointStore(Path(out), _describe(call_or_pipeline, title, seconds), resume=resume)
    result = Sweep(list(store.points) if store else [], bounds, title)
    runner.rate_limited = any(p.refused_by in RATES for p in result.points)
    report = on_progress or print_progress
    random.Random(seed).shuffle(order)
    extra = MAX_EXTRA if refine else 0
    while (step := _next_step(result.points, order, bounds, extra)) is not None:
        done, total = len(result.points), len(result.points) + _steps_left(result.points, order)
        report(Progress(done, total, step.level))
        if not runner.probed:
            await runner.probe()
        known_before = runner.rate_limited
        point = await runner.measure(step, done)
        extra -= step.extra
        result.points.append(point)
        if runner.rate_limited and not known_before:
            for earlier in result.points:  # they may have lived on what a rested bucket held
                earlier.purpose = "burst"
        if store is not None:
            store.add(point)
            store.rewrite()
        report(Progress(done + 1, total, None, point))
    result.hidden_retries = runner.hidden_retries
    return result


@dataclass(frozen=True, slots=True)
class _Step:
    """What to measure next; `seconds` None is the usual window."""

    level: int
    purpose: Purpose = "level"
    seconds: float | None = None
    extra: bool = False


def _next_step(points: Sequence[Point], order: Sequence[int], bounds: Bounds, extra: int) -> _Step | None:
    """The asked levels in order, then levels in between, then the confirmation, last the drift. None: done."""
    known = {p.level for p in points if p.purpose in ("level", "confirm")}
    for level in order:
        if level not in known:
            return _Step(level)
    if extra > 0:
        between = next_level(points, bounds)
        if between is not None:
            return _Step(between, extra=True)
        unsure = to_confirm(points, bounds)
        if unsure is not None:
            return _Step(unsure[0], "confirm", unsure[1], extra=True)
    if any(p.purpose == "drift" for p in points):
        return None
    return _Step(order[0], "drift")


def _steps_left(points: Sequence[Point], order: Sequence[int]) -> int:
    known = {p.level for p in points if p.purpose in ("level", "confirm")}
    return max(1, sum(level not in known for level in order) + (not any(p.purpose == "drift" for p in points)))


def print_progress(progress: Progress) -> None:
    """A line for each level that has been measured."""
    point = progress.point
    if point is not None:
        print(
            f"[{progress.done}/{progress.total}] {point.level:>3} at once: {point.goodput:7.2f} ok/s, "
            f"429 {point.share_429:6.1%}, p95 {point.service_p95 or float('nan'):.3g} s",
            flush=True,
        )


class _Runner:
    """Runs the caller's work at one level after the other."""

    def __init__(
        self,
        target: Callable[[Any], Awaitable[object]] | Pipeline,
        items: Iterable[Any],
        *,
        retry: Retry,
        request_timeout: float | None,
        open_items: int,
        seconds: float | None,
        highest: int,
    ) -> None:
        self._target = target
        self._items = _endless(items)
        self._retry = retry
        self._request_timeout = request_timeout
        self._open_items = open_items
        self._seconds = seconds
        self._highest = highest
        self._service_seconds = 0.5
        self._service_spread = 0.5
        self._proven = False
        self.probed = False
        self.rate_limited = False
        self.hidden_retries = False

    async def probe(self) -> None:
        """Learn the service time from a few calls; then warm up at the highest level and see if it is refused."""
        self.probed = True
        few = min(_FEW_CALLS, self._highest)
        async with self._running(few) as run:
            await run.until(math.inf, lambda: run.succeeded() >= _FEW_CALLS)
            self._learn(run)
        self._proven = True
        async with self._running(self._highest) as run:
            await run.until(clock() + self._window_seconds(), lambda: run.refusals.count > 0)
            self.rate_limited = self.rate_limited or run.refusals.count > 0

    async def measure(self, step: _Step, order: int) -> Point:
        """One level, from a known state of the provider's buckets."""
        window_seconds = step.seconds or self._window_seconds()
        if self.rate_limited:
            await self._empty_bucket(step.level, window_seconds)
        async with self._running(step.level) as run:
            started_at = clock()
            await run.warmed_up(self._service_seconds)
            meter = _ClientMeter()
            start = clock()
            await run.until(start + window_seconds, lambda: False)
            window = Window(start, clock(), start - started_at, meter.cpu_share(), meter.loop_lag_p99())
            meter.stop()
            self._learn(run)
            self.rate_limited = self.rate_limited or run.refusals.count > 0
        # Only now, with the rest cancelled and recorded, is it known how long what was in flight at the end ran.
        return measure(step.level, run.queue.records(), window, order=order, purpose=step.purpose)

    async def _empty_bucket(self, level: int, window_seconds: float) -> None:
        """Spend what a rested bucket holds, at the highest level; then let it refill a little.

        A window brings n = window * level / service calls, give or take cv * sqrt(n) (a renewal count, Cox 1962).
        """
        async with self._running(self._highest) as run:
            await run.until(clock() + _EMPTYING_SECONDS, lambda: run.refusals.count > 0)
        calls = window_seconds * level / self._service_seconds
        ups_and_downs = _MARGIN_DEVIATIONS * self._service_spread / math.sqrt(calls) * window_seconds
        await asyncio.sleep(self._service_seconds + ups_and_downs)

    @asynccontextmanager
    async def _running(self, level: int) -> AsyncIterator[_Run]:
        refusals = _RateRefusals()
        queue = LLMQueue(level, request_timeout=self._request_timeout, classify=refusals.judge, telemetry=None)
        with using(queue):
            outcomes = self._start(queue, level)
            consuming = _consume(outcomes, proven=self._proven)
            look_seconds = min(_LOOK_SECONDS[1], max(_LOOK_SECONDS[0], 0.05 * self._service_seconds))
            run = _Run(queue, refusals, asyncio.create_task(consuming), look_seconds)
        try:
            yield run
        finally:
            run.consumer.cancel()
            await asyncio.gather(run.consumer, return_exceptions=True)

    def _start(self, queue: LLMQueue, level: int) -> ItemRun[Any, Any]:
        if isinstance(self._target, Pipeline):
            return self._target.run(self._items, open_items=max(level, self._open_items), retry=self._retry)
        call = self._target
        meta = LLMTaskMeta(getattr(call, "__name__", None))

        async def ungated(item: Any) -> object:
            with using(None):  # it holds a slot already: what it submits itself must not wait for a second one
                return await call(item)

        async def run_one(_index: int, item: Any) -> object:
            return await queue.submit(functools.partial(ungated, item), meta=meta, retry=self._retry)

        return ItemRun(run_one, self._items, lambda: 2 * level)  # as many wait as run: the queue is never empty

    def _window_seconds(self) -> float:
        return self._seconds or min(20.0, max(2.0, 40.0 * self._service_seconds))

    def _learn(self, run: _Run) -> None:
        done = run.service_times()
        if done:
            self._service_seconds = sum(done) / len(done)
            self._service_spread = spread(done)
        seen = any(attempt.seen for attempt in run.queue.records().attempts)
        hidden = run.queue.hidden_retries or (run.refusals.hidden_retries and not seen)
        self.hidden_retries = self.hidden_retries or bool(hidden)


class _RateRefusals:
    """Counts refusals by a limit on a rate, or by one that does not say what it limits."""

    def __init__(self) -> None:
        self.count = 0
        self.hidden_retries = False

    def judge(self, error: BaseException) -> Verdict:
        """`llmq.classify`, counted; also sees if the SDK had retried by itself before it gave up."""
        verdict = classify(error)
        self.count += verdict.limit_type in RATES
        request = getattr(getattr(error, "response", None), "request", None)
        retries = getattr(request, "headers", {}).get("x-stainless-retry-count", "0")
        self.hidden_retries = self.hidden_retries or retries != "0"
        return verdict


class _Run:
    """One level while it runs."""

    def __init__(
        self, queue: LLMQueue, refusals: _RateRefusals, consumer: asyncio.Task[None], look_seconds: float
    ) -> None:
        self.queue = queue
        self.refusals = refusals
        self.consumer = consumer
        self._look_seconds = look_seconds

    async def warmed_up(self, service_seconds: float) -> None:
        """Until the level is full and one service time has passed since, or it is plain that it stays unfilled."""
        deadline = clock() + 2.0 + 5.0 * service_seconds
        await self.until(deadline, lambda: self.queue.statistics().in_flight >= self.queue.max_concurrency)
        await self.until(min(deadline, clock() + service_seconds), lambda: False)

    async def until(self, deadline: float, enough: Callable[[], bool]) -> None:
        """Until the deadline, or `enough()`, or there is nothing left to do."""
        while clock() < deadline and not self.consumer.done() and not enough():
            await asyncio.sleep(min(self._look_seconds, deadline - clock()))
        self._raise_if_broken()

    def succeeded(self) -> int:
        """Successful calls so far."""
        return self.queue.statistics().ended[Outcome.SUCCEEDED]

    def service_times(self) -> list[float]:
        """Of the successful attempts so far, in seconds."""
        records = self.queue.records().attempts
        return [a.service_seconds for a in records if a.outcome == "ok" and a.service_seconds is not None]

    def _raise_if_broken(self) -> None:
        if self.consumer.done() and not self.consumer.cancelled():
            error = self.consumer.exception()
            if error is not None:
                raise error


class _ClientMeter:
    """CPU of this process and lag of this loop. Says None in virtual time, where neither means anything."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self._virtual = isinstance(loop, VirtualLoop)
        self._wall, self._cpu = time.monotonic(), time.process_time()
        self._lags: list[float] = []
        self._task = None if self._virtual else loop.create_task(self._watch())

    def cpu_share(self) -> float | None:
        """CPU seconds a second since the start."""
        wall = time.monotonic() - self._wall
        return None if self._virtual or wall <= 0 else (time.process_time() - self._cpu) / wall

    def loop_lag_p99(self) -> float | None:
        """99th percentile of how much later than asked the loop woke a sleeper, in seconds."""
        return percentile(self._lags, 0.99)

    def stop(self) -> None:
        """Stop watching."""
        if self._task is not None:
            self._task.cancel()

    async def _watch(self) -> None:
        while True:
            asked = time.monotonic() + _LAG_SECONDS
            await asyncio.sleep(_LAG_SECONDS)
            self._lags.append(max(0.0, time.monotonic() - asked))


async def _consume(outcomes: ItemRun[Any, Any], *, proven: bool) -> None:
    """Take outcomes as they come. Until the work is `proven`, raise where nothing succeeds."""
    errors: list[BaseException] = []
    async with outcomes as stream:
        async for outcome in stream:
            if proven or outcome.error is None:
                break
            errors.append(outcome.error)
            verdict = classify(outcome.error)
            hopeless = _ERRORS_TO_GIVE_UP if verdict.kind in (Kind.CALLER, Kind.QUOTA) else _FAILURES_TO_GIVE_UP
            halted = isinstance(outcome.error, QueueHaltedError)
            if halted or len(errors) >= hopeless:
                if verdict.kind is Kind.CALLER and verdict.status_code is None and not halted:
                    raise outcome.error  # a bug in the caller's own code
                raise ProviderError(
                    f"none of the first {len(errors)} calls succeeded ({describe(outcome.error)}); there is nothing to "
                    "measure",
                    status_code=verdict.status_code,
                ) from outcome.error
        async for _ in stream:
            pass


def _checked_levels(levels: Iterable[int]) -> list[int]:
    found = list(levels) if isinstance(levels, Iterable) and not isinstance(levels, str) else [levels]
    if not found or any(type(level) is not int or level < 1 for level in found):
        raise ConfigError(f"levels are calls at once, whole numbers, each at least 1; got {levels!r}")
    return sorted(set(found))


def _positive(name: str, value: float | None) -> float | None:
    if value is not None and not 0 < value < math.inf:
        raise ConfigError(f"{name} must be more than 0 and finite, got {value}")
    return value


def _endless(items: Iterable[T]) -> Iterator[T]:
    """A collection over and over, an iterator as it is."""
    if isinstance(items, AsyncIterable):
        raise ConfigError("sweep() needs a plain iterable of items, not an asynchronous one")
    if not isinstance(items, Collection):
        return iter(items)
    if not items:
        raise ConfigError("sweep() needs at least one item")
    return itertools.cycle(items)


def _describe(target: object, title: str, seconds: float | None) -> str:
    """What tells one sweep from another, when it is resumed."""
    stages = [stage.name for stage in target.stages] if isinstance(target, Pipeline) else []
    what = "-".join(stages[:4]) or getattr(target, "__name__", "call")
    return f"{title or 'sweep'}; {what}; {'automatic' if seconds is None else f'{seconds:g} s'} a level"
