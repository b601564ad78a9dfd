"""One window of a sweep while it runs: the work under way, counted as it ends, and how this client fares."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import math
import time
from collections.abc import AsyncIterable, Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

from llmq.errors import ConfigError, ProviderError, QueueHaltedError
from llmq.items import ItemRun
from llmq.ledger import BudgetEvent, Ledger
from llmq.pipeline import Pipeline
from llmq.queue import LLMQueue
from llmq.records import AttemptRecord
from llmq.retry import Kind, Verdict, classify, describe, limits_told
from llmq.tune.guard import Used
from llmq.tune.limits import by_a_rate
from llmq.tune.statistics import percentile
from llmq.virtual import VirtualLoop
from llmq.waiters import clock

T = TypeVar("T")

_LAG_SECONDS = 0.01
_ERRORS_TO_GIVE_UP = 3
_FAILURES_TO_GIVE_UP = 8
_MOST_AT_ONE_MOMENT = 10_000


class Run(Ledger):
    """One window while it runs. The ledger of its queue: so it sees each attempt end, without polling."""

    consumer: asyncio.Task[None]
    queue: LLMQueue

    def __init__(self, used: Used, look_seconds: float) -> None:
        super().__init__()
        self.ended = self.succeeded = self.refusals = self.rate_refusals = 0
        self.hidden_retries = False
        self.last_error: BaseException | None = None
        self.meter: ClientMeter | None = None
        self.told: dict[str, float] = {}
        self.responses: list[tuple[float, float]] = []
        self._spent = used
        self._left_calls = used.left_calls
        self._look_seconds = look_seconds
        self._loop = asyncio.get_running_loop()
        self._enough: Callable[[], bool] = lambda: False
        self._woken = asyncio.Event()

    def judge(self, error: BaseException) -> Verdict:
        """`llmq.classify`; also sees what limits are told, and if the SDK had retried by itself before it gave up."""
        verdict = classify(error)
        if isinstance(error, Exception):
            self.last_error = error
        request = getattr(getattr(error, "response", None), "request", None)
        retries = getattr(request, "headers", {}).get("x-stainless-retry-count", "0")
        self.hidden_retries = self.hidden_retries or retries != "0"
        for state in limits_told(error) if verdict.refused else ():
            if state.limit is not None:
                self.told[state.dimension] = state.limit
        return verdict

    def add_attempt(self, record: AttemptRecord) -> tuple[BudgetEvent, ...]:
        """Count an attempt, from whatever thread; wake `until` when it is enough."""
        self._spent.add_attempt(record)
        self.ended += record.started_at is not None
        self.succeeded += record.outcome == "ok"
        refused = record.outcome == "rejected"
        self.refusals += refused
        self.rate_refusals += refused and by_a_rate(record)
        if not self._woken.is_set() and (self._enough() or self._spent.at_cap() is not None):
            self._loop.call_soon_threadsafe(self._woken.set)
        return ()

    def raise_hopeless(self, what: str) -> None:
        """Raise the last error where nothing has succeeded; `what` ends its message."""
        if self.succeeded == 0 and self.last_error is not None:
            _raise_hopeless(self.ended, self.last_error, what)

    async def may_send(self) -> None:
        """Count a call that no queue holds; where the cap on calls leaves none, wait to be cancelled."""
        if self._left_calls <= 0:
            await asyncio.Event().wait()
        self._left_calls -= 1

    async def warmed_up(self, service_seconds: float, *, paced: bool) -> None:
        """Until the level is full and one service time has passed since, or it is plain that it stays unfilled.

        Where starts are paced it need not fill: two service times are enough. Where a limit on calls at once refuses
        some of the first, all are held back for these; so until it refuses again.
        """
        if paced:
            await self.until(clock() + 2.0 * service_seconds)
            return
        deadline = clock() + 2.0 + 5.0 * service_seconds
        while clock() < deadline and not self.consumer.done() and self._is_filling():
            await self.until(min(deadline, clock() + self._look_seconds))
        await self.until(min(deadline, clock() + service_seconds))
        before = self.refusals
        if before > self.rate_refusals:
            await self.until(deadline, lambda: self.refusals > before)

    def _is_filling(self) -> bool:
        return self.queue.statistics().in_flight < self.queue.max_concurrency

    async def until(self, deadline: float, enough: Callable[[], bool] = lambda: False) -> None:
        """Until the deadline, or `enough()`, or there is nothing left to do. Raises `Stopped` at a cap."""
        self._enough = enough
        self._woken.clear()
        latest = min(deadline, self._spent.ends_at)
        if not enough() and not self.consumer.done() and latest > clock():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if latest == math.inf else latest - clock()):
                    await self._woken.wait()
        self._spent.check_caps()
        self._raise_if_broken()

    def wake(self, _: object = None) -> None:
        """There is nothing left to do."""
        self._woken.set()

    def service_times(self) -> list[float]:
        """Of the successful attempts so far, in seconds."""
        records = self.queue.records().attempts
        return [a.service_seconds for a in records if a.outcome == "ok" and a.service_seconds is not None]

    def _raise_if_broken(self) -> None:
        if self.consumer.done() and not self.consumer.cancelled():
            error = self.consumer.exception()
            if error is not None:
                raise error


class ClientMeter:
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
        """How much later than asked the loop woke a sleeper, in seconds."""
        return lag_p99(self._lags)

    def stop(self) -> None:
        """Stop watching."""
        if self._task is not None:
            self._task.cancel()

    async def _watch(self) -> None:
        while True:
            asked = time.monotonic() + _LAG_SECONDS
            await asyncio.sleep(_LAG_SECONDS)
            self._lags.append(max(0.0, time.monotonic() - asked))


def lag_p99(lags: Sequence[float]) -> float | None:
    """The 99th percentile; of fewer than 200 the third longest: a hiccup or two in a second are no limit."""
    return percentile(lags, min(0.99, max(0.0, 1 - 2 / max(1, len(lags) - 1))))


async def consume(outcomes: ItemRun[Any, Any], *, proven: bool) -> None:
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
                _raise_hopeless(len(errors), outcome.error, "there is nothing to measure")
        moment, at_once = -math.inf, 0
        async for outcome in stream:
            at_once = at_once + 1 if clock() == moment else 0
            moment = clock()
            if at_once >= _MOST_AT_ONE_MOMENT:
                _raise_stuck(at_once, outcome.error)


def _raise_stuck(calls: int, error: BaseException | None) -> NoReturn:
    """On a virtual clock what never waits keeps the time from going on."""
    why = "" if error is None else f" ({describe(error)})"
    raise ConfigError(
        f"{calls} calls in a row took no virtual time{why}, so the window would never end: let each wait by the loop's "
        "timers, also where it fails"
    ) from error


def _raise_hopeless(calls: int, error: BaseException, what: str) -> NoReturn:
    """Nothing has succeeded; `error` is the last."""
    verdict = classify(error)
    if verdict.kind is Kind.CALLER and verdict.status_code is None and not isinstance(error, QueueHaltedError):
        raise error  # a bug in the caller's own code
    raise ProviderError(
        f"none of the first {calls} calls succeeded ({describe(error)}); {what}", status_code=verdict.status_code
    ) from error


def check_target(target: object) -> None:
    """Raises ConfigError for what cannot be measured."""
    if not isinstance(target, Pipeline) and not callable(target):
        raise ConfigError(f"what is measured is a Pipeline, or an async function of one item; got {target!r}")


def awaitable(result: Awaitable[T], call: object) -> Awaitable[T]:
    """What `call` returned. Raises ConfigError for what a plain function returns."""
    if not inspect.isawaitable(result):
        raise ConfigError(
            f"what is measured is an async function, but {call!r} returned {type(result).__name__}, which cannot be "
            "awaited; use an asynchronous client, or asyncio.to_thread for one that blocks"
        )
    return result


def endless(items: Iterable[T]) -> Iterator[T]:
    """A collection over and over, an iterator as it is."""
    if isinstance(items, AsyncIterable):
        raise ConfigError("the items are a plain iterable, such as a list, and not an asynchronous one")
    if not isinstance(items, Iterable):
        raise ConfigError(f"the items are a list or an iterator; got {items!r}")
    if type(items).__name__ == "DataFrame":
        raise ConfigError(
            "the items are a DataFrame, which would give the names of its columns; give a column (df['prompt']), or "
            "its rows (df.to_dict('records'))"
        )
    if not isinstance(items, Collection):
        return iter(items)
    if len(items) == 0:  # the truth value of an array is ambiguous
        raise ConfigError("at least one item is needed; got an empty collection")
    return itertools.cycle(items)
