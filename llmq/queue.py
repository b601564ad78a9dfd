"""The queue: a gate in front of calls to a provider. `submit` runs a call in the caller's own task once a slot is free.

How it works
- `Scheduler` decides, under one lock that is only ever held for a few plain statements: never across an await,
  a call of user code, or a wake-up.
- A slot is a lease. Whoever ends it appends to `_inbox`, which `_settle` empties under the lock. A finaliser may run
  in the middle of anything, so it takes the lock only if it is free at once; if not, its holder settles when it lets
  go: whoever takes the lock calls `_settle` afterwards. Ending a lease twice does nothing.
- A waiting caller is parked in its own loop or thread and woken once, after the scheduler gave it the slot. If it
  was cancelled meanwhile it gives the slot back; if its loop has ended, the wake-up fails and `_settle` does.
- Back-off holds no slot. A refusal that says Retry-After also holds back all waiters of that model, for as long
  as the refused operation itself sleeps: the hold ends with that sleep, however it ends, so that it needs
  no timer and cannot be forgotten.
- What a closed event loop leaves behind, slots, places and holds, is found at the next settling, once there has been
  a caller from elsewhere. A `Slot` stays with whoever has it.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import anyio

from llmq.core import Job, LLMTaskMeta, Outcome, Scheduler, State, Statistics
from llmq.errors import QueueDrainingError, QueueTimeout, RequestTimeout
from llmq.items import ItemRun
from llmq.records import AttemptRecord, CallOutcome, OperationRecord, RecordBuffer, Records
from llmq.retry import Classify, Kind, Retry, Verdict, classify, judged, timed
from llmq.telemetry import OperationSpan, Telemetry
from llmq.waiters import AsyncWaiter, Gone, ThreadWaiter, Waiter, clock, in_trio_run, new_waiter, running_loop

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

T = TypeVar("T")
R = TypeVar("R")
W = TypeVar("W", bound=Waiter)


class _Return(NamedTuple):
    """What comes back: an attempt with its ending, or with `job` None an operation that ends in its back-off."""

    operation: _Operation
    job: Job | None
    outcome: Outcome
    closing: bool


_NO_META = LLMTaskMeta()
_ABANDONED = Verdict(Kind.CANCELLED)
_GIVE_UP = (None, Verdict(Kind.CALLER))
_default_telemetry = Telemetry()

MAX_RECORDS = 100_000
"""Operations, and attempts, that `records()` keeps."""


_Loop = weakref.ref["AbstractEventLoop"]


class _CallJob(Job):
    """An attempt's place in the queue, and its operation."""

    __slots__ = ("operation",)

    operation: _Operation


class LLMQueue:
    """At most `max_concurrency` calls at once, over all event loops and threads of the process.

    - `submit` for a coroutine function: one call, from any asyncio or trio task.
    - `slot` for a stream, or whatever is not one awaitable: held until the block ends.
    - `map` for many items: outcomes as they come, no task an item.
    - `submit_sync` for blocking functions, from plain threads.

    `queue_timeout` bounds a wait for a slot, `request_timeout` a call in its slot, each attempt anew; both in
    seconds, None for no bound. `classify` judges exceptions. `telemetry=None` switches spans and metrics off.
    """

    def __init__(
        self,
        max_concurrency: int = 3,
        *,
        queue_timeout: float | None = None,
        request_timeout: float | None = None,
        classify: Classify = classify,
        telemetry: Telemetry | None = _default_telemetry,
        max_records: int = MAX_RECORDS,
    ) -> None:
        self.queue_timeout = _positive("queue_timeout", queue_timeout)
        self.request_timeout = _positive("request_timeout", request_timeout)
        self._classify = classify
        self._telemetry = telemetry
        self._records = RecordBuffer(max_records)
        self._operation_ids = itertools.count(1)
        self._scheduler = Scheduler(max_concurrency)
        self._lock = threading.Lock()
        self._inbox: deque[_Return] = deque()
        self._orphans: deque[tuple[_Operation, bool]] = deque()
        self._backing_off: set[_Operation] = set()
        self._open_operations = 0
        self._draining = False
        self._drainers: list[Waiter] = []
        self._loops: set[_Loop] = set()
        self._strangers = False  # callers of no asyncio loop: threads, trio, slots

    @property
    def max_concurrency(self) -> int:
        """The cap in force."""
        return self._scheduler.limit

    @property
    def open_operations(self) -> int:
        """Calls accepted and not yet ended: waiting, running, or sleeping between attempts."""
        self._settle()
        return self._open_operations

    async def submit(
        self,
        factory: Callable[[], Awaitable[T]],
        *,
        meta: LLMTaskMeta | None = None,
        retry: Retry | None = None,
    ) -> T:
        """Await `factory()` in this task once a slot is free; its result or exception passes unchanged.

        Without `retry` it is called once. With it, each attempt takes a new slot at the front of its class, and
        no slot is held in between. Raises `QueueTimeout`, `RequestTimeout` and `QueueDrainingError` of its own.

        Do not submit from within a call that holds a slot: when all slots are held that way, none becomes free.
        """
        operation = _Operation(self, meta or _NO_META, running_loop())
        if operation.span is not None:
            operation.span.attach()
        failed = 0
        while True:
            await operation.enter()
            try:
                result = await timed(factory, self.request_timeout)
            except BaseException as error:
                failed += 1
                delay, verdict = self._decide(error, retry, failed)
                if delay is None:
                    operation.leave(error, verdict)
                    raise
                operation.hold_back(verdict)  # first, so that the slot does not go to the next of this model
                operation.leave(error, verdict, closing=False)
            else:
                operation.leave()
                return result
            await operation.back_off(delay)

    def slot(self, meta: LLMTaskMeta | None = None) -> Slot:
        """A slot to hold for a block: `async with queue.slot(): ...`. No time-out applies inside it."""
        return Slot(self, meta or _NO_META)

    def map(
        self,
        call: Callable[[T], Awaitable[R]],
        items: Iterable[T] | AsyncIterable[T],
        *,
        meta: LLMTaskMeta | Callable[[T], LLMTaskMeta] | None = None,
        ordered: bool = False,
        retry: Retry | None = None,
    ) -> ItemRun[T, R]:
        """`call(item)` for each item, pulled as slots free up; an outcome each, with `.result` or `.error`.

        `async with queue.map(...) as outcomes: async for outcome in outcomes: ...`; on asyncio also plain
        `async for`. `items` may be lazy, asynchronous or endless. `ordered` keeps the order of the items. Calls share
        a few tasks, so a context variable that one sets may be seen by a later one.
        """

        async def run_one(_index: int, item: T) -> R:
            def start() -> Awaitable[R]:
                run.grow()
                return call(item)

            return await self.submit(start, meta=meta(item) if callable(meta) else meta, retry=retry)

        # One item more than there are slots: the one that waits finds out at once when the queue has grown.
        run = ItemRun(run_one, items, lambda: self._scheduler.limit + 1, ordered=ordered)
        return run

    def submit_sync(self, fn: Callable[..., T], *args: object, meta: LLMTaskMeta | None = None) -> T:
        """Call `fn(*args)` in this thread once a slot is free; blocks. Not from a thread that runs an event loop.

        `request_timeout` does not apply: a blocking function cannot be stopped from outside.
        """
        if running_loop() is not None or in_trio_run():
            raise RuntimeError(
                "submit_sync() would block the event loop that runs in this thread; use `await queue.submit(...)`"
            )
        operation = _Operation(self, meta or _NO_META, None)
        operation.enter_blocking()
        try:
            result = fn(*args)
        except BaseException as error:
            operation.leave(error, judged(self._classify, error))
            raise
        operation.leave()
        return result

    def resize(self, max_concurrency: int) -> None:
        """Change the cap. Running calls keep their slots, so a lower cap is reached as they end."""
        self._reconfigure(limit=max_concurrency)

    def pause(self) -> None:
        """Start nothing more until `resume`. Running calls go on."""
        self._reconfigure(paused=True)

    def resume(self) -> None:
        """Undo `pause` and `drain`."""
        self._draining = False
        self._reconfigure(paused=False)

    async def drain(self, timeout: float | None = None) -> None:
        """Refuse new calls, let those accepted finish (a pause ends), and return when none is left.

        Raises `QueueTimeout` when that takes longer than `timeout` seconds; the calls go on, and new ones stay
        refused until `resume`.
        """
        waiter = new_waiter()
        with self._lock:
            self._draining = True
            self._drainers.append(waiter)
        self._reconfigure(paused=False)
        try:
            with anyio.move_on_after(timeout) as scope:
                await waiter.wait()
        finally:
            with suppress(ValueError):
                self._drainers.remove(waiter)
        if scope.cancelled_caught:
            raise QueueTimeout(
                f"{self._open_operations} calls were still open after drain(timeout={timeout:g}); they go on; "
                "wait again, or cancel their tasks"
            )

    def statistics(self) -> Statistics:
        """Counts of attempts now: limit, in flight, waiting, ended. Changes nothing."""
        self._bury_orphans()
        try:
            with self._lock:
                return self._scheduler.statistics(clock())
        finally:
            self._settle()

    def records(self) -> Records:
        """The newest operations and attempts, at most `max_records` of each, oldest first."""
        self._bury_orphans()
        return self._records.snapshot()

    def __repr__(self) -> str:
        now = self.statistics()
        return f"<LLMQueue {now.in_flight} of {now.limit} in flight, {now.waiting} waiting>"

    def _reconfigure(self, *, limit: int | None = None, paused: bool | None = None) -> None:
        started: list[Job] = []
        try:
            with self._lock:
                started = self._scheduler.reconfigure(clock(), limit=limit, paused=paused)
        finally:
            self._wake(started)

    def _decide(self, error: BaseException, retry: Retry | None, failed: int) -> tuple[float | None, Verdict]:
        """Seconds until the next attempt, or None, and what the error means. Never raises: a slot depends on it."""
        try:
            verdict = judged(self._classify, error)
            return None if retry is None else retry.delay_seconds(failed, verdict), verdict
        except Exception:
            return _GIVE_UP

    def _ask(self, operation: _Operation, make_waiter: Callable[[], W]) -> W | None:
        """Submit the operation's next attempt. None: it has its slot; else it must wait there."""
        job = operation.job
        waiter: W | None = None
        started: list[Job] = []
        try:
            with self._lock:
                first = operation.attempts == 1
                if first and self._draining:
                    raise QueueDrainingError("the queue refuses new calls since drain(); resume() opens it again")
                started = self._scheduler.submit(job, operation.asked_at)
                self._open_operations += first
                started += self._lift(operation, operation.asked_at)
                self._backing_off.discard(operation)
                if operation.loop is None:
                    self._strangers = True
                else:
                    self._loops.add(operation.loop)
                if job.state is not State.RUNNING:
                    job.waiter = waiter = make_waiter()
        finally:
            self._wake([other for other in started if other is not job])
        return waiter

    def _lift(self, operation: _Operation, now: float) -> list[Job]:
        """End the hold that an operation has on its model, if it has one."""
        if operation.holds is None:
            return []
        (key,) = operation.holds
        operation.holds = None
        return self._scheduler.lift(key, now)

    def _give_back(self, returned: _Return, *, finaliser: bool = False) -> None:
        """End an attempt, or an operation between attempts."""
        self._inbox.append(returned)
        if not finaliser:
            self._settle()
        while self._inbox and self._lock.acquire(blocking=False):
            try:
                started, drainers = self._empty_inbox()
            finally:
                self._lock.release()
            self._wake_up(started, drainers)

    def _settle(self) -> None:
        """Take back whatever came, and wake whom that lets start. Called after every hold of the lock."""
        if self._strangers or len(self._loops) > 1:
            self._notice_dead_loops()
        while self._inbox or (self._drainers and not self._open_operations):
            with self._lock:
                started, drainers = self._empty_inbox()
            self._wake_up(started, drainers)

    def _empty_inbox(self) -> tuple[list[Job], list[Waiter]]:
        started: list[Job] = []
        now = clock()
        while self._inbox:
            started += self._take_back(self._inbox.popleft(), now)
        if self._open_operations:
            return started, []
        drainers, self._drainers = self._drainers, []
        return started, drainers

    def _take_back(self, returned: _Return, now: float) -> list[Job]:
        operation, job, outcome, closing = returned
        if job is None:
            if operation not in self._backing_off:
                return []  # taken back already
            self._backing_off.discard(operation)
            started = self._lift(operation, now)
        elif job.state is State.WAITING:
            started = self._scheduler.cancel(job, now)
        elif job.state is State.RUNNING:
            started = self._scheduler.finish(job, outcome, now)
            if not closing:
                self._backing_off.add(operation)
        else:
            return []  # it was never accepted, or has been taken back already
        self._open_operations -= closing
        return started

    def _wake(self, started: list[Job]) -> None:
        self._wake_up(started, [])
        self._settle()

    def _wake_up(self, started: list[Job], drainers: list[Waiter]) -> None:
        for job in started:
            waiter: Waiter = job.waiter  # type: ignore[assignment]  # the core keeps it as an opaque object
            try:
                waiter.wake()
            except Gone:
                self._inbox.append(_lost(job))
        for drainer in drainers:
            with suppress(Gone):
                drainer.wake()

    def _notice_dead_loops(self) -> None:
        """Take back what belongs to closed loops."""
        dead = {ref for ref in list(self._loops) if (loop := ref()) is None or loop.is_closed()}
        if not dead:
            return
        with self._lock:
            self._loops -= dead
            gone = [_lost(job) for job in self._scheduler.running if job.operation.loop in dead]  # type: ignore[attr-defined]
            asleep = [_Return(o, None, Outcome.IGNORED, True) for o in self._backing_off if o.loop in dead]
        self._inbox.extend(gone)
        self._inbox.extend(asleep)

    def _bury_orphans(self) -> None:
        """Record what ended in a finaliser, which must not do so itself: telemetry takes locks."""
        while self._orphans:
            with suppress(IndexError):
                operation, in_attempt = self._orphans.popleft()
                operation.record(None, _ABANDONED, in_attempt=in_attempt, closing=True)


class Slot:
    """A lease of one slot: `async with queue.slot() as slot`. Made by `LLMQueue.slot`.

    It ends with the block, with `release()` from any task or thread, or when it is collected; whichever comes
    first counts, the others do nothing.
    """

    __slots__ = ("__weakref__", "_entered", "_lease", "_meta", "_queue")

    def __init__(self, queue: LLMQueue, meta: LLMTaskMeta) -> None:
        self._queue = queue
        self._meta = meta
        self._entered = False
        self._lease: list[_Operation] = []

    async def __aenter__(self) -> Slot:
        if self._entered:
            raise RuntimeError("this slot was entered before; ask queue.slot() for another one")
        self._entered = True
        operation = _Operation(self._queue, self._meta, None)  # of no loop: it may outlive this one
        await operation.enter()
        self._lease.append(operation)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release(exc)

    def release(self, error: BaseException | None = None) -> None:
        """End the lease. `error` says why, if it was one. Once; further calls do nothing."""
        try:
            operation = self._lease.pop()  # atomic: only one of several enders gets it
        except IndexError:
            return
        operation.leave(error, None if error is None else judged(self._queue._classify, error))

    def __del__(self) -> None:
        if self._lease:
            self._lease.pop().abandon()


class _Operation:
    """One submitted call: its attempts' places in the queue, and what is recorded of them."""

    __slots__ = (
        "asked_at",
        "attempts",
        "holds",
        "id",
        "job",
        "loop",
        "meta",
        "queue",
        "span",
        "started_at",
        "submitted_at",
        "wait_seconds",
    )

    def __init__(self, queue: LLMQueue, meta: LLMTaskMeta, loop: AbstractEventLoop | None) -> None:
        queue._bury_orphans()
        self.queue = queue
        self.meta = meta
        self.loop: _Loop | None = None if loop is None else weakref.ref(loop)
        self.id = next(queue._operation_ids)
        self.attempts = 0
        self.holds: tuple[str | None] | None = None
        self.wait_seconds = 0.0
        self.span: OperationSpan | None = None
        if queue._telemetry is not None:
            self.span = queue._telemetry.operation_started(meta)
        self.submitted_at = clock()

    async def enter(self) -> None:
        """Get a slot for the next attempt. If it raises, the operation is over and recorded."""
        self._next_attempt()
        try:
            waiter = self.queue._ask(self, new_waiter)
            if waiter is not None:
                await self._wait(waiter)
        except BaseException as error:
            self.leave(error, judged(self.queue._classify, error))
            raise
        self._started()

    def enter_blocking(self) -> None:
        """`enter` for a plain thread."""
        queue = self.queue
        self._next_attempt()
        try:
            waiter = queue._ask(self, ThreadWaiter)
            if waiter is not None and not waiter.wait_blocking(queue.queue_timeout):
                self._give_up_waiting()
        except BaseException as error:
            self.leave(error, judged(queue._classify, error))
            raise
        self._started()

    def leave(
        self, error: BaseException | None = None, verdict: Verdict | None = None, *, closing: bool = True
    ) -> None:
        """End the attempt, and with `closing` the operation: first its slot, then its records."""
        if isinstance(error, GeneratorExit):
            self.abandon()
            return
        outcome = Outcome.SUCCEEDED if verdict is None else verdict.outcome
        self.queue._give_back(_Return(self, self.job, outcome, closing))
        self.record(error, verdict, closing=closing)

    def abandon(self, *, in_attempt: bool = True) -> None:
        """End everything from a finaliser."""
        self.queue._orphans.append((self, in_attempt))
        job = self.job if in_attempt else None
        self.queue._give_back(_Return(self, job, Outcome.IGNORED, True), finaliser=True)

    def hold_back(self, verdict: Verdict) -> None:
        """Keep the model's waiters back until the next attempt, if the provider said how long to wait."""
        if not verdict.refused or verdict.retry_after_seconds is None:
            return
        queue, started = self.queue, []
        try:
            with queue._lock:
                self.holds = (self.job.key,)
                started = queue._scheduler.hold(self.job.key, clock())
        finally:
            queue._wake(started)

    async def back_off(self, delay_seconds: float) -> None:
        """Sleep between attempts, with no slot."""
        try:
            await anyio.sleep(delay_seconds)
        except GeneratorExit:
            self.abandon(in_attempt=False)
            raise
        except BaseException as error:
            self.queue._give_back(_Return(self, None, Outcome.IGNORED, True))
            self._record_operation(error, judged(self.queue._classify, error), clock())
            raise

    def record(
        self, error: BaseException | None, verdict: Verdict | None, *, closing: bool, in_attempt: bool = True
    ) -> None:
        """Write the attempt's record, and with `closing` the operation's."""
        now = clock()
        if in_attempt:
            self._record_attempt(error, verdict, now)
        if closing:
            self._record_operation(error, verdict, now)

    def _record_attempt(self, error: BaseException | None, verdict: Verdict | None, now: float) -> None:
        meta = self.meta
        record = AttemptRecord(
            self.id,
            self.attempts,
            meta.stage,
            meta.model_name,
            meta.service_id,
            meta.request_id,
            self.asked_at,
            self.started_at,
            now,
            _outcome(error, verdict),
        )
        if verdict is not None:
            record.status_code = verdict.status_code
            record.limit_type = verdict.limit_type
            record.retry_after_seconds = verdict.retry_after_seconds
            record.error_type = _error_type(error)
        self.wait_seconds += record.wait_seconds
        self.queue._records.attempts.append(record)
        if self.span is not None:
            self.span.attempt_ended(record)

    def _record_operation(self, error: BaseException | None, verdict: Verdict | None, now: float) -> None:
        meta = self.meta
        record = OperationRecord(
            self.id,
            meta.stage,
            meta.model_name,
            meta.service_id,
            meta.request_id,
            self.submitted_at,
            now,
            self.attempts,
            self.wait_seconds,
            _outcome(error, verdict),
            None if verdict is None else _error_type(error),
        )
        self.queue._records.operations.append(record)
        if self.span is not None:
            self.span.detach()
            self.span.ended(record)

    def _next_attempt(self) -> None:
        meta = self.meta
        self.attempts += 1
        self.started_at: float | None = None
        self.asked_at = clock()
        self.job = _CallJob(meta.priority, meta.rank, meta.model_name, front=self.attempts > 1)
        self.job.operation = self

    async def _wait(self, waiter: AsyncWaiter) -> None:
        queue_timeout = self.queue.queue_timeout
        if queue_timeout is None:
            await waiter.wait()
            return
        with anyio.move_on_after(queue_timeout) as scope:
            await waiter.wait()
        if scope.cancelled_caught:
            self._give_up_waiting()

    def _give_up_waiting(self) -> None:
        """Raise `QueueTimeout`, unless the slot came at the last moment."""
        queue = self.queue
        try:
            with queue._lock:
                if self.job.state is State.RUNNING:
                    return
                others = queue._scheduler.waiting - 1
        finally:
            queue._settle()
        raise QueueTimeout(
            f"waited queue_timeout={queue.queue_timeout:g} s for one of {queue.max_concurrency} slots, with "
            f"{others} others waiting; raise queue_timeout or max_concurrency, or submit less at once"
        )

    def _started(self) -> None:
        self.started_at = clock()
        if self.span is not None:
            self.span.attempt_started(self.attempts)


def _lost(job: Job) -> _Return:
    """The attempt of a caller whose loop has ended."""
    return _Return(job.operation, job, Outcome.IGNORED, True)  # type: ignore[attr-defined]  # every job here is a _CallJob


def _outcome(error: BaseException | None, verdict: Verdict | None) -> CallOutcome:
    if verdict is None:
        return "ok"
    if verdict.kind is Kind.CANCELLED:
        return "cancelled"
    if isinstance(error, (RequestTimeout, QueueTimeout)):
        return "timeout"
    return "rejected" if verdict.refused else "error"


def _error_type(error: BaseException | None) -> str | None:
    return None if error is None else type(error).__qualname__


def _positive(name: str, seconds: float | None) -> float | None:
    if seconds is not None and not seconds > 0:
        raise ValueError(f"{name} must be more than 0 seconds, or None for no bound; got {seconds}")
    return seconds
