"""The queue: a gate in front of calls to a provider. `submit` runs a call in the caller's own task once a slot is free.

How it works
- `Scheduler` decides, under one lock that is only ever held for a few plain statements: never across an await,
  a call of user code, or a wake-up.
- A slot is a lease. Whoever ends it, a task, a thread, a finaliser, appends to `_inbox` and calls `_settle`, which
  takes the lock only if it is free at once. If it is not, its holder finds the inbox when it lets go. So a
  garbage collection in the middle of a locked section cannot deadlock, and ending a lease twice does nothing.
- A waiting caller is parked in its own loop or thread and woken once, after the scheduler gave it the slot. If it
  was cancelled meanwhile it gives the slot back; if its loop has ended, the wake-up fails and `_settle` does.
- Back-off holds no slot. A refusal that says Retry-After also holds back all waiters of that model, for as long
  as the refused operation itself sleeps: the hold ends with that sleep, however it ends, so that it needs
  no timer and cannot be forgotten.
"""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Final, TypeVar

import anyio

from llmq.core import Job, LLMTaskMeta, Outcome, Scheduler, State, Statistics
from llmq.errors import QueueDrainingError, QueueTimeout, RequestTimeout
from llmq.items import ItemRun
from llmq.records import AttemptRecord, CallOutcome, OperationRecord, RecordBuffer, Records
from llmq.retry import Classify, Kind, Retry, Verdict, classify, timed
from llmq.telemetry import OperationSpan, Telemetry
from llmq.waiters import AsyncWaiter, Gone, ThreadWaiter, Waiter, clock, in_trio_run, new_waiter, running_loop

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

T = TypeVar("T")
R = TypeVar("R")
W = TypeVar("W", bound=Waiter)

_NOT_HELD: Final = "\0"
_Return = tuple[Job | None, Outcome, bool, str | None]
"""What comes back: the attempt that ends (None: one in back-off), how, whether its operation ends with it, and
the model whose hold it takes along (`_NOT_HELD`: none)."""

_NO_META = LLMTaskMeta()
_ABANDONED = Verdict(Kind.CANCELLED)
_SUCCESS = Verdict(Kind.CALLER)
_default_telemetry = Telemetry()

MAX_RECORDS = 100_000
"""Operations, and attempts, that `records()` keeps."""


class _CallJob(Job):
    """An attempt's place in the queue, and the asyncio loop that it belongs to."""

    __slots__ = ("loop",)

    loop: weakref.ref[AbstractEventLoop] | None


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
        self._orphans: deque[_Operation] = deque()
        self._open_operations = 0
        self._draining = False
        self._drainers: list[Waiter] = []
        self._last_loop: weakref.ref[AbstractEventLoop] | None = None

    @property
    def max_concurrency(self) -> int:
        """The cap in force."""
        return self._scheduler.limit

    @property
    def open_operations(self) -> int:
        """Calls accepted and not yet ended: waiting, running, or sleeping between attempts."""
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
        """
        operation = _Operation(self, meta or _NO_META)
        if operation.span is not None:
            operation.span.attach()
        failed = 0
        while True:
            await operation.enter()
            try:
                result = await timed(factory, self.request_timeout)
            except BaseException as error:
                failed += 1
                verdict = self._judge(error)
                delay = None if retry is None else retry.delay_seconds(failed, verdict)
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
        `async for`. `items` may be lazy, asynchronous or endless. `ordered` keeps the order of the items.
        """

        async def run_one(_index: int, item: T) -> R:
            return await self.submit(
                functools.partial(call, item), meta=meta(item) if callable(meta) else meta, retry=retry
            )

        return ItemRun(run_one, items, lambda: self._scheduler.limit, ordered=ordered)

    def submit_sync(self, fn: Callable[..., T], *args: object, meta: LLMTaskMeta | None = None) -> T:
        """Call `fn(*args)` in this thread once a slot is free; blocks. Not from a thread that runs an event loop.

        `request_timeout` does not apply: a blocking function cannot be stopped from outside.
        """
        if running_loop() is not None or in_trio_run():
            raise RuntimeError(
                "submit_sync() would block the event loop that runs in this thread; use `await queue.submit(...)`"
            )
        operation = _Operation(self, meta or _NO_META)
        operation.enter_blocking()
        try:
            result = fn(*args)
        except BaseException as error:
            operation.leave(error, self._judge(error))
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
        with self._lock:
            self._draining = True
            waiter = new_waiter() if self._open_operations else None
            if waiter is not None:
                self._drainers.append(waiter)
        self._reconfigure(paused=False)
        if waiter is None:
            return
        with anyio.move_on_after(timeout) as scope:
            await waiter.wait()
        if scope.cancelled_caught:
            raise QueueTimeout(
                f"{self._open_operations} calls were still open after drain(timeout={timeout:g}); they go on; "
                "wait again, or cancel their tasks"
            )

    def statistics(self) -> Statistics:
        """Counts of attempts now: limit, in flight, waiting, ended. Changes nothing."""
        self._bury_orphans()
        with self._lock:
            return self._scheduler.statistics(clock())

    def records(self) -> Records:
        """The newest operations and attempts, at most `max_records` of each, oldest first."""
        self._bury_orphans()
        return self._records.snapshot()

    def __repr__(self) -> str:
        now = self.statistics()
        return f"<LLMQueue {now.in_flight} of {now.limit} in flight, {now.waiting} waiting>"

    def _reconfigure(self, *, limit: int | None = None, paused: bool | None = None) -> None:
        with self._lock:
            started = self._scheduler.reconfigure(clock(), limit=limit, paused=paused)
        self._wake(started)

    def _judge(self, error: BaseException) -> Verdict:
        try:
            return self._classify(error)
        except Exception as broken:
            error.add_note(f"llmq: classify() itself raised {broken!r}, so this was not judged")
            return Verdict(Kind.CALLER)

    def _ask(self, operation: _Operation, make_waiter: Callable[[], W]) -> W | None:
        """Submit the operation's next attempt. None: it has its slot; else it must wait there."""
        job = operation.job
        waiter: W | None = None
        with self._lock:
            if operation.attempts == 1:
                if self._draining:
                    raise QueueDrainingError("the queue refuses new calls since drain(); resume() opens it again")
                self._open_operations += 1
            started = self._scheduler.submit(job, operation.asked_at)
            if operation.holding:
                operation.holding = False
                started += self._scheduler.lift(job.key, operation.asked_at)
            if job.state is not State.RUNNING:
                job.waiter = waiter = make_waiter()
                self._notice_dead_loops(job.loop)
        self._wake([other for other in started if other is not job])
        return waiter

    def _give_back(self, returned: _Return) -> None:
        """End an attempt, or an operation between attempts. From anywhere, also finalisers; never blocks."""
        self._inbox.append(returned)
        self._settle()

    def _settle(self) -> None:
        while self._inbox and self._lock.acquire(blocking=False):
            drainers: list[Waiter] = []
            started: list[Job] = []
            try:
                now = clock()
                while self._inbox:
                    started += self._take_back(self._inbox.popleft(), now)
                if not self._open_operations:
                    drainers, self._drainers = self._drainers, drainers
            finally:
                self._lock.release()
            for job in started:
                self._wake_one(job)
            for drainer in drainers:
                with suppress(Gone):
                    drainer.wake()

    def _take_back(self, returned: _Return, now: float) -> list[Job]:
        job, outcome, closing, held_key = returned
        if job is not None:
            if job.state in (State.NEW, State.ENDED):
                return []  # it was never accepted, or has been taken back already
            started = self._scheduler.cancel(job, now)
            if job.state is State.RUNNING:
                started = self._scheduler.finish(job, outcome, now)
        else:
            started = self._scheduler.lift(held_key, now) if held_key is not _NOT_HELD else []
        self._open_operations -= closing
        return started

    def _wake(self, started: list[Job]) -> None:
        for job in started:
            self._wake_one(job)
        self._settle()

    def _wake_one(self, job: Job) -> None:
        waiter: Waiter = job.waiter  # type: ignore[assignment]  # the core keeps it as an opaque object
        try:
            waiter.wake()
        except Gone:
            self._inbox.append((job, Outcome.IGNORED, True, _NOT_HELD))

    def _notice_dead_loops(self, loop: weakref.ref[AbstractEventLoop] | None) -> None:
        """Take back the slots of closed loops. Called with the lock, only when a caller of another loop waits."""
        if loop is not None and loop is self._last_loop:
            return
        self._last_loop = loop
        for job in self._scheduler.running:
            home = job.loop() if isinstance(job, _CallJob) and job.loop is not None else None
            if home is not None and home.is_closed():
                self._inbox.append((job, Outcome.IGNORED, True, _NOT_HELD))

    def _bury_orphans(self) -> None:
        """Record the slots that a finaliser ended; it must not do so itself."""
        while self._orphans:
            with suppress(IndexError):
                self._orphans.popleft().record(None, _ABANDONED, closing=True)


class Slot:
    """A lease of one slot: `async with queue.slot() as slot`. Made by `LLMQueue.slot`.

    It ends with the block, with `release()` from any task or thread, or when it is collected; whichever comes
    first counts, the others do nothing.
    """

    __slots__ = ("__weakref__", "_lease", "_operation")

    def __init__(self, queue: LLMQueue, meta: LLMTaskMeta) -> None:
        self._operation = _Operation(queue, meta)
        self._lease: list[_Operation] = []

    async def __aenter__(self) -> Slot:
        if self._operation.attempts:
            raise RuntimeError("this slot was entered before; ask queue.slot() for another one")
        await self._operation.enter()
        self._lease.append(self._operation)
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
        if error is None:
            operation.leave()
        else:
            operation.leave(error, operation.queue._judge(error))

    def __del__(self) -> None:
        if self._lease:
            operation = self._lease.pop()
            operation.queue._orphans.append(operation)
            operation.queue._give_back((operation.job, Outcome.IGNORED, True, _NOT_HELD))


class _Operation:
    """One submitted call: its attempts' places in the queue, and what is recorded of them."""

    __slots__ = (
        "asked_at",
        "attempts",
        "holding",
        "id",
        "job",
        "meta",
        "queue",
        "span",
        "started_at",
        "submitted_at",
        "wait_seconds",
    )

    def __init__(self, queue: LLMQueue, meta: LLMTaskMeta) -> None:
        self.queue = queue
        self.meta = meta
        self.id = next(queue._operation_ids)
        self.attempts = 0
        self.holding = False
        self.wait_seconds = 0.0
        self.span: OperationSpan | None = None
        if queue._telemetry is not None:
            self.span = queue._telemetry.operation_started(meta)
        self.submitted_at = clock()

    async def enter(self) -> None:
        """Get a slot for the next attempt. If it raises, the operation is over and recorded."""
        queue, loop = self.queue, running_loop()
        self._next_attempt(loop)
        try:
            waiter = queue._ask(self, new_waiter)
            if waiter is not None:
                await self._wait(waiter)
        except BaseException as error:
            self.leave(error, queue._judge(error))
            raise
        self._started()

    def enter_blocking(self) -> None:
        """`enter` for a plain thread."""
        queue = self.queue
        self._next_attempt(None)
        try:
            waiter = queue._ask(self, ThreadWaiter)
            if waiter is not None and not waiter.wait_blocking(queue.queue_timeout):
                self._give_up_waiting()
        except BaseException as error:
            self.leave(error, queue._judge(error))
            raise
        self._started()

    def leave(
        self, error: BaseException | None = None, verdict: Verdict | None = None, *, closing: bool = True
    ) -> None:
        """End the attempt, and with `closing` the operation: first its slot, then its records."""
        outcome = Outcome.SUCCEEDED if verdict is None else verdict.outcome
        self.queue._give_back((self.job, outcome, closing, _NOT_HELD))
        self.record(error, verdict, closing=closing)

    def hold_back(self, verdict: Verdict) -> None:
        """Keep the model's waiters back until the next attempt, if the provider said how long to wait."""
        if not verdict.refused or verdict.retry_after_seconds is None:
            return
        queue = self.queue
        with queue._lock:
            self.holding = True
            started = queue._scheduler.hold(self.job.key, clock())
        queue._wake(started)

    async def back_off(self, delay_seconds: float) -> None:
        """Sleep between attempts, with no slot."""
        try:
            await anyio.sleep(delay_seconds)
        except BaseException as error:
            queue = self.queue
            queue._give_back((None, Outcome.IGNORED, True, self.job.key if self.holding else _NOT_HELD))
            self._record_operation(error, queue._judge(error), clock())
            raise

    def record(self, error: BaseException | None, verdict: Verdict | None, *, closing: bool) -> None:
        """Write the attempt's record, and with `closing` the operation's."""
        now = clock()
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
        if closing:
            self._record_operation(error, verdict, now)

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

    def _next_attempt(self, loop: AbstractEventLoop | None) -> None:
        self.queue._bury_orphans()
        meta = self.meta
        self.attempts += 1
        self.started_at: float | None = None
        self.asked_at = clock()
        self.job = _CallJob(meta.priority, meta.rank, meta.model_name, front=self.attempts > 1)
        self.job.loop = None if loop is None else weakref.ref(loop)

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
        with queue._lock:
            if self.job.state is State.RUNNING:
                return
            ahead = queue._scheduler.waiting - 1
        raise QueueTimeout(
            f"waited queue_timeout={queue.queue_timeout:g} s for one of {queue.max_concurrency} slots, with "
            f"{ahead} others waiting; raise queue_timeout or max_concurrency, or submit less at once"
        )

    def _started(self) -> None:
        self.started_at = clock()
        if self.span is not None:
            self.span.attempt_started(self.attempts)


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
