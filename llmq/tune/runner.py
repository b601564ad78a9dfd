"""Runs the caller's work at one setting after the other, and measures each from a known state. asyncio only.

- Each window has a queue of its own; that queue owns the retries, so refusals are seen.
- First a few calls tell the service time; then a run at the highest level warms everything up, until service times
  have settled, and finds out whether a rate limit refuses.
- If one does, its bucket is brought to one state before each window: emptied, since a bucket that has rested gives a
  burst that flatters whichever level comes first, then left to refill a little: for one service time, since the first
  calls of a level come all at once, and for three standard deviations of how many calls a window brings, since a
  level right at the limit has ups and downs. What is above the limit by more than that runs dry within its window.
  One that is closed for longer, as it says or was seen to be, is waited for. For a level that is far below the rate
  it is not emptied: that level cannot live on what is in it.
- Of each window, what happens until the level is reached and one service time has passed is discarded (one of the
  window before, where that is longer: a server may work on at what was cancelled), and then what the series itself
  shows to be unsettled (`settled_part`).
- A window lasts three times as long as the provider was seen to close for (a Retry-After, or nothing let in), up to
  three minutes: a limit on a minute is judged on minutes.
- Event-loop lag and CPU tell when this client is the limit, and not the provider (`llmq.tune.running`).
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from llmq.core import LLMTaskMeta
from llmq.core.rates import paces
from llmq.errors import ConfigError
from llmq.items import ItemRun
from llmq.ledger import Price
from llmq.pipeline import Pipeline
from llmq.queue import LLMQueue
from llmq.records import Records
from llmq.retry import Retry
from llmq.runtime import using
from llmq.tune.guard import WARM_UP_SECONDS, Caps, Prediction, Stopped, Used, predict
from llmq.tune.limits import by_a_rate, closed_seconds
from llmq.tune.plan import Step
from llmq.tune.point import Point, Purpose, Setting, Window, measure, settled_part
from llmq.tune.running import ClientMeter, Run, awaitable, consume, endless
from llmq.tune.statistics import percentile, spread
from llmq.unqueued import unqueued
from llmq.waiters import clock

T = TypeVar("T")

_LOOK_SECONDS = (0.01, 0.25)
_FEW_CALLS = 8
_LAST_CALLS = 100
_EMPTYING_SECONDS = 60.0
_FAR_BELOW = 0.25
_MARGIN_DEVIATIONS = 3.0
_MOST_LONGER = 5.0
_HOLDS = 3.0
_LONGEST_HOLD = 60.0
_WARM_UP_WINDOWS = 3
_SETTLED = 1.15


@dataclass(frozen=True, slots=True)
class Load:
    """How windows are filled and how long they last. `seconds` and `calls` (None: by the service time) of a usual one;
    `arrivals`: calls a second, at random (Poisson), or the seconds at which they come; None: a closed loop."""

    seconds: float | None = None
    calls: int | None = None
    arrivals: float | tuple[float, ...] | None = None
    seed: int = 0

    def window_seconds(self, service_seconds: float) -> float:
        """How long a usual window lasts at least."""
        if self.seconds is not None:
            return self.seconds
        if self.calls is not None:
            return 10.0 * service_seconds
        return min(20.0, max(2.0, 40.0 * service_seconds))


class Runner:
    """Runs one target at any setting. Raises what the work raises if nothing but errors of its own comes back."""

    def __init__(
        self,
        target: Callable[[Any], Awaitable[object]] | Pipeline,
        items: Iterable[Any],
        *,
        load: Load,
        retry: Retry,
        request_timeout: float | None,
        open_items: int,
        highest: int,
        caps: Caps,
        prices: Mapping[str, Price],
    ) -> None:
        self._target = target
        self._items = endless(items)
        self._load = load
        self._retry = retry
        self._request_timeout = request_timeout
        self._open_items = open_items
        self._highest = highest
        self._proven = False
        self._longest_hold = 0.0
        self._left_seconds = 0.0
        self.used = Used(caps, prices)
        self.service_seconds = 0.5
        self.service_spread = 0.5
        self.probed = False
        self.rate_limited = False
        self.lets_in = 0.0
        """Calls a second that the provider's limit on a rate lets in at its slowest; 0: not known."""
        self.hidden_retries = False

    async def probe(self) -> None:
        """Learn the service time from a few calls, and whether the caps can be kept."""
        few = min(_FEW_CALLS, self._highest)
        async with self._running(Setting(few)) as run:
            try:
                await run.until(math.inf, lambda: run.succeeded >= _FEW_CALLS)
            except Stopped as stopped:
                run.raise_hopeless(str(stopped))
                raise
            run.raise_hopeless("there are no more items")
            self._learn(run)
        if self.service_seconds <= 0:
            raise ConfigError(
                "a call takes no virtual time, so there is nothing to measure: let it wait by the loop's timers "
                "(asyncio.sleep, llmq.testing.SimulatedProvider), or measure in real time, without virtual"
            )
        self.used.check_countable()
        self._proven = self.probed = True

    async def warm_up(self) -> None:
        """Run at the highest level until service times have settled; see if it is refused."""
        before = None
        for _ in range(_WARM_UP_WINDOWS):
            async with self._running(Setting(self._highest)) as run:
                await run.until(clock() + max(WARM_UP_SECONDS, self.usual_seconds()))
                self.rate_limited = self.rate_limited or run.rate_refusals > 0
                times = run.service_times()
                self._learn_hold(run.queue.records())
            half = len(times) // 2
            first, second = times[:half], times[half:]
            middle = percentile(second, 0.5)
            earlier = before if before is not None else percentile(first, 0.5)
            if middle is None or earlier is None or earlier <= _SETTLED * middle:
                return
            before = middle

    async def settle(self, seconds: float) -> None:
        """Run at the highest level for so long, whatever it shows."""
        async with self._running(Setting(self._highest)) as run:
            await run.until(clock() + seconds)
            self.rate_limited = self.rate_limited or run.rate_refusals > 0

    def predicted(self, levels: Sequence[int], *, refine: bool, virtual: bool) -> Prediction:
        """What a sweep over these levels will use, after `probe`."""
        return predict(
            levels,
            service_seconds=self.service_seconds,
            window_seconds=self.usual_seconds(),
            window_calls=self._load.calls or 0,
            rate_per_second=self._offered_rate(),
            tokens_per_call=self.used.tokens_per_call,
            cost_per_call=self.used.cost_per_call,
            refine=refine,
            virtual=virtual,
        )

    def usual_seconds(self) -> float:
        """How long a usual window lasts at least."""
        return self._load.window_seconds(self.service_seconds)

    async def measure(self, step: Step, order: int, purpose: Purpose) -> tuple[Point, Records]:
        """One window, from a known state of the provider's buckets."""
        usual = self.usual_seconds()
        longest = math.inf if self._load.calls else max(_MOST_LONGER * usual, step.most_seconds if step.extra else 0.0)
        wished = min(step.seconds, longest)
        least = max(step.windows * usual, wished, _HOLDS * self._longest_hold)
        calls = max(step.calls, math.ceil(step.windows * (self._load.calls or 0)))
        if self.rate_limited:
            await self._prepare_bucket(step.setting.level, least)
        left_seconds = self._left_seconds  # a server may go on with what the last window cancelled
        async with self._running(step.setting, order) as run:
            started_at = clock()
            await run.warmed_up(max(self.service_seconds, left_seconds), paced=step.setting.paced)
            self._check_items(run)
            meter = run.meter = ClientMeter()
            start = clock()
            calls += run.ended
            await run.until(start + least)
            longest = min(longest, self._longest_seconds(step.setting, calls))
            await run.until(start + max(least, longest), lambda: run.ended >= calls)
            window = Window(start, clock(), start - started_at, meter.cpu_share(), meter.loop_lag_p99())
            self._learn(run)
            self.rate_limited = self.rate_limited or run.rate_refusals > 0
            responses, told = run.responses, run.told
        # Only now, with the rest cancelled and recorded, is it known how long what was in flight at the end ran.
        records = run.queue.records()
        self._learn_hold(records)
        window, steady = settled_part(records, window, paced=step.setting.paced)
        point = measure(
            step.setting,
            records,
            window,
            order=order,
            purpose=purpose,
            offered_rate=self._offered_rate(),
            open_items=self._open(step.setting.level) if isinstance(self._target, Pipeline) else None,
            responses=responses,
            told=told,
            prices=self.used.prices,
        )
        return replace(point, steady=steady), records

    async def hold(self, setting: Setting | None, seconds: float, begun: Callable[[], bool]) -> tuple[float, float]:
        """Run at a setting, or (None) with the flag off, for so long after it has `begun`; from when to when."""
        if self.rate_limited:
            await self._prepare_bucket(self._open_items if setting is None else setting.level, seconds)
        async with self._running(setting) as run:
            await run.until(clock() + 2.0 * self.service_seconds)
            await run.until(clock() + 100.0 * self.service_seconds, begun)
            start = clock()
            await run.until(start + seconds)
            return start, clock()

    def _longest_seconds(self, setting: Setting, calls: int) -> float:
        """How long a window may take at most for its calls, at what its level and pace should bring."""
        rates = [setting.level / self.service_seconds]
        if setting.requests_per_minute is not None:
            rates.append(setting.requests_per_minute / 60)
        offered = self._offered_rate()
        if offered is not None:
            rates.append(offered)
        return _MOST_LONGER * calls / min(rates)

    async def _prepare_bucket(self, level: int, window_seconds: float) -> None:
        """Spend what a rested bucket holds, at the highest level, if it matters; then let it refill a little.

        A window brings n = window * level / service calls, give or take cv * sqrt(n) (a renewal count, Cox 1962).
        """
        told = 0.0
        if level / self.service_seconds >= _FAR_BELOW * self.lets_in:
            async with self._running(Setting(self._highest)) as run:
                await run.until(clock() + _EMPTYING_SECONDS, lambda: run.rate_refusals > 0)
                told = self._learn_hold(run.queue.records())
        calls = window_seconds * level / self.service_seconds
        ups_and_downs = _MARGIN_DEVIATIONS * self.service_spread / math.sqrt(calls) * window_seconds
        await asyncio.sleep(max(self.service_seconds + ups_and_downs, told or self._longest_hold))

    @asynccontextmanager
    async def _running(self, setting: Setting | None, number: int | None = None) -> AsyncIterator[Run]:
        """The work under way at a setting; None: with the flag off, and as many items open as the settings say.

        `number`: of the window, whose arrivals are its own. Raises `Stopped` where a cap is met already.
        """
        self.used.check_caps()
        run = Run(self.used, min(_LOOK_SECONDS[1], max(_LOOK_SECONDS[0], 0.05 * self.service_seconds)))
        run.queue = LLMQueue(
            self._open_items if setting is None else setting.level,
            limits=[]
            if setting is None
            else [*paces(setting.requests_per_minute, setting.tokens_per_minute), *self.used.limits()],
            request_timeout=self._request_timeout,
            classify=run.judge,
            telemetry=None,
            ledger=run,
            max_records=None,  # a window is measured of all its calls
        )
        with using(None if setting is None else run.queue):
            if self._load.arrivals is not None and self._proven and setting is not None:
                consuming = self._arriving(run, number)
            else:
                consuming = consume(self._start(run, off=setting is None), proven=self._proven)
            run.consumer = asyncio.create_task(consuming)
            run.consumer.add_done_callback(run.wake)
        try:
            yield run
        finally:
            run.consumer.cancel()
            if run.meter is not None:
                run.meter.stop()
            await asyncio.gather(run.consumer, return_exceptions=True)
            self._left_seconds = percentile(run.service_times()[-_LAST_CALLS:], 0.95) or 0.0

    def _offered_rate(self) -> float | None:
        arrivals = self._load.arrivals
        if arrivals is None or isinstance(arrivals, (int, float)):
            return arrivals
        return (len(arrivals) - 1) / (arrivals[-1] - arrivals[0])

    def _check_items(self, run: Run) -> None:
        """Raise `Stopped` where an iterator has ended: no window is measured of nothing."""
        if run.consumer.done():
            raise Stopped(
                f"ran out of items after {self.used.calls} calls; give more items, or a list, which is used over and "
                "over"
            )

    def _start(self, run: Run, *, off: bool) -> ItemRun[Any, Any]:
        level = run.queue.max_concurrency
        if isinstance(self._target, Pipeline):
            target = self._pipeline_off(run, self._target) if off else self._target
            return target.run(self._items, open_items=self._open(level), retry=self._retry)
        one = self._off(run, self._target, self._retry, self._request_timeout) if off else self._one(run.queue)

        async def run_one(_index: int, item: Any) -> object:
            return await one(item)

        # With a queue as many wait as run: it is never empty.
        return ItemRun(run_one, self._items, lambda: level if off else 2 * level)

    def _open(self, level: int) -> int:
        return max(level, self._open_items)

    def _pipeline_off(self, run: Run, pipeline: Pipeline) -> Pipeline:
        """The same pipeline with the flag off; each stage counts, an ungated one as one call, whatever it sends."""
        return Pipeline(
            replace(stage, gated=False, call=self._off(run, stage.call, self._retry if stage.gated else None))
            for stage in pipeline.stages
        )

    def _off(
        self, run: Run, call: Callable[..., Awaitable[Any]], retry: Retry | None, request_timeout: float | None = None
    ) -> Callable[..., Awaitable[Any]]:
        """A call with the flag off, which counts."""

        async def sent(*arguments: Any) -> Any:
            await run.may_send()
            return await call(*arguments)

        async def one(*arguments: Any) -> Any:
            return await unqueued(
                functools.partial(sent, *arguments), retry=retry, request_timeout=request_timeout, ledger=run
            )

        return one

    def _one(self, queue: LLMQueue) -> Callable[[Any], Awaitable[object]]:
        call = self._target
        assert not isinstance(call, Pipeline)
        meta = LLMTaskMeta(getattr(call, "__name__", None))

        async def ungated(item: Any) -> object:
            with using(None):  # it holds a slot already: what it submits itself must not wait for a second one
                return await awaitable(call(item), call)

        async def one(item: Any) -> object:
            return await queue.submit(functools.partial(ungated, item), meta=meta, retry=self._retry)

        return one

    async def _arriving(self, run: Run, number: int | None) -> None:
        """An open loop: each call at its time, whatever became of those before."""
        one = self._one(run.queue)

        async def timed(item: Any, intended_at: float) -> None:
            try:
                await one(item)
            except Exception:
                return  # it is in the records
            ended_at = clock()
            run.responses.append((ended_at, ended_at - intended_at))

        async with asyncio.TaskGroup() as group:
            for intended_at, item in zip(self._arrival_times(clock(), number), self._items, strict=False):
                await asyncio.sleep(intended_at - clock())
                group.create_task(timed(item, intended_at))

    def _arrival_times(self, now: float, number: int | None) -> Iterator[float]:
        arrivals = self._load.arrivals
        if isinstance(arrivals, tuple):
            gap = (arrivals[-1] - arrivals[0]) / (len(arrivals) - 1)
            for round_ in itertools.count():
                begin = now + round_ * (arrivals[-1] - arrivals[0] + gap)
                yield from (begin + at - arrivals[0] for at in arrivals)
        rng = random.Random(f"{self._load.seed} {number}")  # a window more is to be a sample more
        while arrivals is not None and not isinstance(arrivals, tuple):
            now += rng.expovariate(arrivals)
            yield now

    def _learn(self, run: Run) -> None:
        done = run.service_times()
        if done:
            self.service_seconds = sum(done) / len(done)
            self.service_spread = spread(done)
        seen = any(attempt.seen for attempt in run.queue.records().attempts)
        hidden = run.queue.hidden_retries or (run.hidden_retries and not seen)
        self.hidden_retries = self.hidden_retries or bool(hidden)

    def _learn_hold(self, records: Records) -> float:
        """How long the provider closes for, as it says or as is seen; what it says, at most a minute."""
        refused = (a for a in records.attempts if a.outcome == "rejected" and by_a_rate(a))
        told = min(_LONGEST_HOLD, max((a.retry_after_seconds or 0.0 for a in refused), default=0.0))
        self._longest_hold = max(self._longest_hold, told, min(_LONGEST_HOLD, closed_seconds(records.attempts)))
        return told
