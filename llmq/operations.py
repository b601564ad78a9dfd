"""One submitted call, from `submit` to its result: its attempts' places in the queue, and what is recorded of them.

A `Slot` goes a short way where it can: as long as its queue is `quick` (nobody looks on, no rate and no Retry-After is
in force) and a slot is free, it is its own place in the queue and its own record. In every other case, and for every
`submit`, an `Operation` does the work.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from types import CodeType, TracebackType
from typing import TYPE_CHECKING, TypeVar

from llmq import waiters
from llmq.core import NO_META, Drop, Job, LLMTaskMeta, Outcome, Scheduler, State
from llmq.errors import (
    QueueCancelledError,
    QueueClosedError,
    QueueDrainingError,
    QueueDroppedError,
    QueueError,
    QueueFullError,
    QueueTimeout,
    RequestTimeout,
)
from llmq.records import AttemptRecord, CallOutcome, OperationRecord
from llmq.retry import Kind, Verdict, judged
from llmq.usage import check_tokens
from llmq.waiters import AsyncWaiter, ThreadWaiter, Waiter, new_waiter

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from llmq.queue import LLMQueue
    from llmq.telemetry import OperationSpan

W = TypeVar("W", bound=Waiter)

ABANDONED = Verdict(Kind.CANCELLED)

_NEW, _RUNNING, _ENDED = State.NEW, State.RUNNING, State.ENDED
_SUCCEEDED = Outcome.SUCCEEDED


class Try(Job):
    """One attempt of an operation."""

    __slots__ = ("operation",)

    operation: Operation | None

    def __init__(self, operation: Operation) -> None:
        super().__init__(operation.meta)
        self.operation = operation


class Retried(Try):
    """One that follows a failed one."""

    __slots__ = ()

    front = True


class Slot(Try):
    """A lease of one slot: `async with queue.slot() as slot`. Made by `LLMQueue.slot`.

    It ends with the block, with `release()` from any task or thread, or when it is collected; whichever comes
    first counts, the others do nothing.
    """

    __slots__ = ("_code", "_instruction", "lease", "queue")

    _code: CodeType
    _instruction: int
    queue: LLMQueue

    async def __aenter__(self) -> Slot:
        if self.state is not _NEW:
            raise RuntimeError("this slot was entered before; ask queue.slot() for another one")
        queue = self.queue
        if not queue._quick or self.meta is not NO_META:
            await self._have_operation().enter(self)
            return self
        scheduler = queue._scheduler
        try:
            held = scheduler.passes.pop()
        except IndexError:
            pass
        else:
            if not scheduler.closed and not scheduler.waiting:
                self.lease = [held]
                self.started_at = waiters.now()
                self.state = _RUNNING
                return self
            scheduler.passes.append(held)  # it came back from another thread, and is wanted elsewhere
            queue._recall()
        woken, waiter = self._ask(queue)  # no coroutine of its own for what follows: 10,000 may be waiting in it
        in_time = True
        try:
            if woken or queue._inbox or queue._mixed or not queue._quick:
                queue._after(woken)
            if waiter is not None:
                in_time = await (waiter if queue.queue_timeout is None else waiter.wait(queue.queue_timeout))
        except BaseException as error:
            operation = self._have_operation()
            operation.started_at = None  # it never began
            operation.leave(error, judged(queue._classify, error))
            raise
        if self.state is not _RUNNING:
            await self._have_operation().wait_for((), None, in_time=in_time)
        return self

    def _ask(self, queue: LLMQueue) -> tuple[Sequence[Job], AsyncWaiter | None]:
        """Submit the slot itself. A waiter: it must wait there."""
        with queue._lock:
            woken, waiter, failure = queue._submit(self, waiters.now(), new_waiter)
            if self.state is _RUNNING:
                queue._scheduler.lend()  # for those who come next
        if failure is None:
            return woken, waiter
        queue._after(woken)
        raise failure

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        queue = self.queue
        if exc is not None or not queue._quick or self.operation is not None:
            self.release(exc)
            return
        scheduler = queue._scheduler
        if self.lease is None:
            self._end(queue, scheduler)
            return
        try:
            held = self.lease.pop()
        except IndexError:
            return  # ended before
        self.state = _ENDED
        at = self.started_at
        queue._records.ended.append((next(scheduler.numbers), at, at, waiters.now()))  # type: ignore[arg-type]
        held.uses += 1
        scheduler.passes.append(held)
        if scheduler.waiting or scheduler.closed:
            queue._recall()

    def _end(self, queue: LLMQueue, scheduler: Scheduler) -> None:
        """End a slot that was waited for, with no operation."""
        if not queue._lock.acquire(blocking=False):  # perhaps by whom a finaliser that runs this has interrupted
            self.release()
            return
        try:
            now = waiters.now()
            woken = scheduler.finish(self, _SUCCEEDED, now)
        finally:
            queue._lock.release()
        if woken is not None:
            queue._records.ended.append((self.sequence, self.submitted_at, self.started_at or now, now))
        if woken:
            queue._wake(woken)
        if queue._inbox or queue._mixed or not queue._quick:
            queue._after()

    def release(self, error: BaseException | None = None) -> None:
        """End the lease. `error` says why, if it was one. Once; further calls do nothing."""
        if self.state is not _RUNNING:
            return
        operation, verdict = self._have_operation(), None
        if error is not None:
            verdict = judged(self.queue._classify, error)
            self.queue._hold_back(operation, verdict)
        operation.leave(error, verdict)

    def report(self, tokens: int) -> None:
        """Tell how many tokens the call really used, prompt and answer together; what was reserved is then settled."""
        check_tokens(tokens)
        self.used_tokens = tokens

    @property
    def place(self) -> str:
        """Where the slot was asked for: file, line and function."""
        code, at = self._code, self._instruction
        line = next((n for start, end, n in code.co_lines() if start <= at < end and n), code.co_firstlineno)
        return f"{code.co_filename}:{line}, in {code.co_qualname}"

    def _have_operation(self) -> Operation:
        """The operation that does the work from now on; of no loop, since it may outlive this one."""
        operation = self.operation
        if operation is None:
            operation = self.operation = Operation(self.queue, self.meta, None)
            if self.lease is not None:
                self.submitted_at = self.started_at or 0.0
                self.sequence = next(self.queue._scheduler.numbers)
                self.used_tokens = None
            if self.state is not _NEW:
                operation.id, operation.attempts = self.sequence, 1
                operation.job = self
                operation.asked_at = operation.began_at = self.submitted_at
                operation.started_at = self.started_at
        return operation

    def __del__(self) -> None:
        if self.state is _RUNNING:
            self.queue._leaked.append(f"the slot taken at {self.place}")
            self._have_operation().abandon()


class Operation:
    """The attempts of one call. All its times are in seconds on the queue's clock."""

    __slots__ = (
        "asked_at",
        "attempts",
        "began_at",
        "closed",
        "drop",
        "id",
        "job",
        "loop",
        "meta",
        "queue",
        "sleeper",
        "span",
        "started_at",
        "wait_seconds",
    )

    job: Job

    def __init__(self, queue: LLMQueue, meta: LLMTaskMeta, loop: AbstractEventLoop | None) -> None:
        self.id = 0
        self.queue = queue
        self.meta = meta
        self.loop = None if loop is None else weakref.ref(loop)
        self.attempts = 0
        self.closed = False
        self.wait_seconds = 0.0
        self.drop: Drop | None = None
        self.sleeper: Waiter | None = None
        self.asked_at = self.began_at = 0.0
        self.started_at: float | None = None
        self.span: OperationSpan | None = None
        if queue._telemetry is not None:
            self.span = queue._telemetry.operation_started(meta)

    async def enter(self, job: Job) -> None:
        """Get a slot for the next attempt. If it raises, the operation is over and recorded."""
        await self.wait_for(*self._ask(job, new_waiter))

    async def wait_for(self, woken: Sequence[Job], waiter: AsyncWaiter | None, *, in_time: bool = True) -> None:
        """What follows on asking: wake whom that let start, and wait for the slot."""
        queue = self.queue
        try:
            queue._after(woken)
            if waiter is not None:
                in_time = await waiter.wait(queue.queue_timeout)
            if not in_time:
                self._give_up_waiting()
            self._check_in()
        except BaseException as error:
            self.leave(error, judged(queue._classify, error))
            raise

    def enter_blocking(self, job: Job) -> None:
        """`enter` for a plain thread."""
        woken, waiter = self._ask(job, ThreadWaiter)
        queue = self.queue
        try:
            queue._after(woken)
            if waiter is not None and not waiter.wait_blocking(queue.queue_timeout):
                self._give_up_waiting()
            self._check_in()
        except BaseException as error:
            self.leave(error, judged(queue._classify, error))
            raise

    def leave(
        self, error: BaseException | None = None, verdict: Verdict | None = None, *, closing: bool = True
    ) -> None:
        """End the attempt, and with `closing` the operation: first its slot, then its records."""
        if isinstance(error, GeneratorExit) or isinstance(getattr(error, "__context__", None), GeneratorExit):
            self.abandon()  # collected: perhaps in the middle of anything
            return
        if self.queue._end(self, _SUCCEEDED if verdict is None else verdict.outcome, closing=closing):
            self.record(error, verdict, closing=closing)

    def abandon(self, *, in_attempt: bool = True) -> None:
        """End everything from a finaliser."""
        self.queue._orphans.append((self, in_attempt))
        self.queue._give_back(self, self.job if in_attempt else None)

    async def back_off(self, delay_seconds: float) -> None:
        """Sleep between attempts, with no slot."""
        queue = self.queue
        try:
            self.sleeper = waiter = new_waiter()
            if self.drop is None:  # cancelled before we lay down
                await waiter.wait(delay_seconds)
            if self.drop is not None:
                raise turned_away(queue, self.drop)
        except GeneratorExit:
            self.abandon(in_attempt=False)
            raise
        except BaseException as error:
            queue._end(self, Outcome.IGNORED, closing=True)
            self._record_operation(error, judged(queue._classify, error), waiters.now())
            raise
        finally:
            self.sleeper = None

    def record(
        self, error: BaseException | None, verdict: Verdict | None, *, closing: bool, in_attempt: bool = True
    ) -> None:
        """Write the attempt's record, and with `closing` the operation's."""
        now = waiters.now()
        if in_attempt:
            self._record_attempt(error, verdict, now)
        if closing:
            self._record_operation(error, verdict, now)

    def _ask(self, job: Job, make_waiter: Callable[[], W]) -> tuple[Sequence[Job], W | None]:
        """Submit the next attempt. A waiter: it must wait there."""
        queue = self.queue
        if queue._orphans or queue._leaked:
            queue._bury_orphans()
        self.job = job
        self.attempts += 1
        self.started_at = None
        self.asked_at = now = waiters.now()
        if self.attempts == 1:
            self.began_at = now
        try:
            asked = queue._ask(self, job, make_waiter, now)
            self.id = self.id or job.sequence
            return asked
        except BaseException as error:
            self.leave(error, judged(queue._classify, error))
            raise

    def _give_up_waiting(self) -> None:
        """Raise `QueueTimeout`, unless the slot came at the last moment."""
        queue, job = self.queue, self.job
        with queue._locked() as scheduler:
            if job.state is not State.WAITING:
                return
            others = scheduler.waiting - 1
            why = scheduler.explain(job, waiters.now(), count=False)
        raise QueueTimeout(
            f"waited queue_timeout={queue.queue_timeout:g} s for one of {queue.max_concurrency} slots, with "
            f"{others} others waiting; at last it {why}; raise queue_timeout or the limit, or submit less at once"
        )

    def _check_in(self) -> None:
        """The wait is over: either we have a slot, or were turned away."""
        job = self.job
        if job.state is not _RUNNING:
            raise turned_away(self.queue, job.drop, job)
        self.started_at = waiters.now()
        if self.span is not None:
            self.span.attempt_started(self.attempts)

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
        self.queue._records.ended.append(record)
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
            self.began_at,
            now,
            self.attempts,
            self.wait_seconds,
            _outcome(error, verdict),
            None if verdict is None else _error_type(error),
        )
        self.queue._records.ended.append(record)
        if self.span is not None:
            self.span.detach()
            self.span.ended(record)


def turned_away(queue: LLMQueue, drop: Drop | None, job: Job | None = None) -> QueueError:
    """What the caller of a dropped call gets."""
    if drop is Drop.FULL:
        full = ""
        if job is not None:
            with queue._locked() as scheduler:
                full = f": {scheduler.describe_depth(job)}"
        return QueueFullError(
            f"the queue is full{full}; submit less at once, raise max_queued, or set overflow to wait or drop_oldest"
        )
    if drop is Drop.OLDEST:
        return QueueDroppedError("this call waited in a full queue and made room for a newer one; raise max_queued")
    if drop is Drop.CANCELLED:
        return QueueCancelledError("cancelled by queue.cancel() while it waited; it was never started")
    if drop is Drop.CLOSED:
        return QueueClosedError("the queue is closed; make another one")
    return QueueDrainingError("the queue refuses new calls since drain(); resume() opens it again")


def _outcome(error: BaseException | None, verdict: Verdict | None) -> CallOutcome:
    if verdict is None:
        return "ok"
    if isinstance(error, QueueFullError):
        return "queue_full"
    if isinstance(error, (QueueDroppedError, QueueClosedError, QueueDrainingError)):
        return "dropped"
    if verdict.kind is Kind.CANCELLED or isinstance(error, QueueCancelledError):
        return "cancelled"
    if isinstance(error, (RequestTimeout, QueueTimeout)):
        return "timeout"
    return "rejected" if verdict.refused else "error"


def _error_type(error: BaseException | None) -> str | None:
    return None if error is None else type(error).__qualname__
