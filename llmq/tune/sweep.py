"""Measure a provider at several concurrency levels, with the caller's own pipeline or coroutine.

How a sweep goes, and why
- A closed loop keeps each level full through a queue of its own; that queue owns the retries, so refusals are seen.
- First a short run at the highest level warms everything up and finds out whether a rate limit refuses.
- If one does, its bucket is brought to one state before each level: emptied, since a bucket that has rested gives a
  burst that flatters whichever level comes first, then left to refill for one service time and 5 % of the window,
  since the first calls of a level come all at once, and a level right at the limit needs that much for its ups and
  downs. A level more than some 6 % above the limit still runs dry within its window.
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
import random
import time
from collections.abc import AsyncIterable, Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llmq.core import LLMTaskMeta
from llmq.errors import ConfigError
from llmq.items import ItemRun
from llmq.pipeline import Pipeline
from llmq.queue import LLMQueue
from llmq.retry import Kind, Retry, Verdict, classify
from llmq.runtime import RuntimeEnv, using
from llmq.tune.point import Point, Purpose, Window, measure
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
_LOOK_SECONDS = 0.01
_LAG_SECONDS = 0.01
_ERRORS_TO_GIVE_UP = 3
_EMPTYING_SECONDS = 60.0
_MARGIN_SHARE = 0.05


@dataclass
class Sweep:
    """What was measured, as it was measured, and what it says."""

    points: list[Point]
    bounds: Bounds = field(default_factory=Bounds)
    title: str = ""

    @property
    def frame(self) -> pd.DataFrame:
        """A DataFrame, a row a measured level in order of level; the columns are the fields of `Point`."""
        import pandas as pd

        columns = [column.name for column in fields(Point)]
        return pd.DataFrame([asdict(p) for p in self.by_level()], columns=columns)

    def recommend(self) -> OperatingPoint:
        """The level to set, and why."""
        return recommend(self.points, self.bounds)

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

    Runs on asyncio. Switch the retries of your own client off (`max_retries=0`): hidden ones cannot be counted.
    Raises what the call raises if nothing but errors of its own comes back, and ConfigError for levels below 1.
    """
    settings = RuntimeEnv.instance().settings
    chosen = sorted(set(DEFAULT_LEVELS if levels is None else levels))
    if not chosen or chosen[0] < 1:
        raise ConfigError(f"levels are calls at once, each at least 1; got {list(levels or ())}")
    if seconds is not None and not seconds > 0:
        raise ConfigError(f"seconds must be more than 0, got {seconds}")
    runner = _Runner(
        call_or_pipeline,
        items,
        retry=settings.retry if retry is None else retry,
        request_timeout=settings.request_timeout if request_timeout is None else request_timeout,
        open_items=open_items or settings.concurrency,
        seconds=seconds,
    )
    bounds = Bounds(max_429_ratio, max_error_ratio, slo_p95)
    store = None if out is None else PointStore(Path(out), _describe(title, seconds), resume=resume)
    result = Sweep(list(store.points) if store else [], bounds, title)
    report = on_progress or print_progress

    order = list(chosen)
    random.Random(seed).shuffle(order)
    total = len(order) + 1
    report(Progress(0, total, chosen[-1]))
    await runner.probe(chosen[-1])

    async def add(level: int, purpose: Purpose = "level", longer: float | None = None) -> None:
        if any(p.level == level and p.purpose == purpose for p in result.points):
            return  # measured before this sweep was resumed
        report(Progress(len(result.points), max(total, len(result.points) + 1), level))
        point = await runner.measure(level, len(result.points), purpose, max_429_ratio, longer)
        if store is not None:
            store.add(point)
        result.points.append(point)
        report(Progress(len(result.points), max(total, len(result.points)), None, point))

    for level in order:
        await add(level)
    for _ in range(MAX_EXTRA if refine else 0):
        between = next_level(result.points, bounds)
        unsure = to_confirm(result.points, bounds)
        if between is None and unsure is None:
            break
        total += 1
        if between is not None:
            await add(between)
        elif unsure is not None:
            await add(unsure[0], "confirm", unsure[1])
    await add(order[0], "drift")
    return result


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
    ) -> None:
        self._target = target
        self._items = _endless(items)
        self._retry = retry
        self._request_timeout = request_timeout
        self._open_items = open_items
        self._seconds = seconds
        self._service_seconds: float | None = None
        self._rate_limited = False
        self._highest = 1

    async def probe(self, level: int) -> None:
        """Warm up at the highest level; learn the service time, and whether a rate limit refuses."""
        self._highest = level
        async with self._running(level) as run:
            await run.warmed_up(None)
            await run.until(clock() + self._window_seconds(run), lambda: run.refusals.count > 0)
            self._learn(run)

    async def measure(
        self, level: int, order: int, purpose: Purpose, max_429_ratio: float, longer: float | None
    ) -> Point:
        """One level, from a known state of the provider's buckets; for `longer` seconds, if that is given."""
        if self._rate_limited:
            await self._empty_bucket()
        async with self._running(level) as run:
            started_at = clock()
            await run.warmed_up(self._service_seconds)
            window_seconds = longer or self._window_seconds(run)
            meter = _ClientMeter()
            start = clock()
            await run.until(start + window_seconds, lambda: False)
            window = Window(start, clock(), start - started_at, meter.cpu_share(), meter.loop_lag_p99())
            meter.stop()
            self._learn(run)
        # Only now, with the rest cancelled and recorded, is it known how long what was in flight at the end ran.
        return measure(level, run.queue.records(), window, order=order, purpose=purpose, max_429_ratio=max_429_ratio)

    async def _empty_bucket(self) -> None:
        """Spend what a rested bucket holds, at the highest level; then let it refill a little."""
        async with self._running(self._highest) as run:
            await run.until(clock() + _EMPTYING_SECONDS, lambda: run.refusals.count > 0)
            window_seconds = self._window_seconds(run)
        await asyncio.sleep((self._service_seconds or 0.0) + _MARGIN_SHARE * window_seconds)

    @asynccontextmanager
    async def _running(self, level: int) -> AsyncIterator[_Run]:
        refusals = _RateRefusals()
        queue = LLMQueue(level, request_timeout=self._request_timeout, classify=refusals.judge, telemetry=None)
        with using(queue):
            outcomes = self._start(queue, level)
            run = _Run(queue, refusals, asyncio.create_task(_consume(outcomes)))
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

        async def run_one(_index: int, item: Any) -> object:
            return await queue.submit(functools.partial(call, item), meta=meta, retry=self._retry)

        return ItemRun(run_one, self._items, lambda: 2 * level)  # as many wait as run: the queue is never empty

    def _window_seconds(self, run: _Run) -> float:
        if self._seconds is not None:
            return self._seconds
        service = self._service_seconds or run.service_seconds() or 0.5
        return min(20.0, max(2.0, 40.0 * service))

    def _learn(self, run: _Run) -> None:
        self._service_seconds = self._service_seconds or run.service_seconds()
        self._rate_limited = self._rate_limited or run.refusals.count > 0


class _RateRefusals:
    """Counts refusals by a limit on a rate, or by one that does not say what it limits."""

    def __init__(self) -> None:
        self.count = 0

    def judge(self, error: BaseException) -> Verdict:
        """`llmq.classify`, counted."""
        verdict = classify(error)
        self.count += verdict.limit_type in ("requests", "tokens", "unknown")
        return verdict


class _Run:
    """One level while it runs."""

    def __init__(self, queue: LLMQueue, refusals: _RateRefusals, consumer: asyncio.Task[None]) -> None:
        self.queue = queue
        self.refusals = refusals
        self.consumer = consumer

    async def warmed_up(self, service_seconds: float | None) -> None:
        """Until the level is full and one service time has passed since, or it is plain that it stays unfilled."""
        started_at = clock()
        full_at: float | None = None
        while not self.consumer.done():
            now = clock()
            known = service_seconds or self.service_seconds()
            if full_at is None and self.queue.statistics().in_flight >= self.queue.max_concurrency:
                full_at = now
            if full_at is not None and known is not None and now >= full_at + known:
                return
            if known is not None and now >= started_at + 2.0 + 5.0 * known:
                return
            await asyncio.sleep(_LOOK_SECONDS)
        self._raise_if_broken()

    async def until(self, deadline: float, enough: Callable[[], bool]) -> None:
        """Until the deadline, or `enough()`, or there is nothing left to do."""
        while clock() < deadline and not self.consumer.done() and not enough():
            await asyncio.sleep(min(_LOOK_SECONDS, max(0.0, deadline - clock())))
        self._raise_if_broken()

    def service_seconds(self) -> float | None:
        """Median service time so far; None before the first success."""
        records = self.queue.records().attempts
        return percentile([a.service_seconds for a in records if a.outcome == "ok" and a.service_seconds], 0.5)

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


async def _consume(outcomes: ItemRun[Any, Any]) -> None:
    """Take outcomes as they come. If nothing but the caller's own errors comes, raise the first: it is a bug."""
    errors: list[BaseException] = []
    async with outcomes as stream:
        async for outcome in stream:
            if outcome.error is None:
                errors = []
                break
            errors.append(outcome.error)
            if len(errors) == _ERRORS_TO_GIVE_UP and all(classify(e).kind is Kind.CALLER for e in errors):
                raise errors[0]
        async for _ in stream:
            pass


def _endless(items: Iterable[T]) -> Iterator[T]:
    """A collection over and over, an iterator as it is."""
    if isinstance(items, AsyncIterable):
        raise ConfigError("sweep() needs a plain iterable of items, not an asynchronous one")
    if not isinstance(items, Collection):
        return iter(items)
    if not items:
        raise ConfigError("sweep() needs at least one item")
    return itertools.cycle(items)


def _describe(title: str, seconds: float | None) -> str:
    return f"{title or 'sweep'}, {'automatic' if seconds is None else f'{seconds:g} s'} a level"
