"""One submitted call, from `submit` to its result: its attempts' places in the queue, and what is recorded of them.

A `Slot` goes a short way where it can: as long as its queue is `quick` (nobody looks on, no rate and no Retry-After is
in force) and a slot is free, it is its own place in the queue and its own record. In every other case, and for every
`submit`, an `Operation` does the work.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import CodeType, TracebackType
from typing import TYPE_CHECKING, TypeVar

from llmq import waiters
from llmq.core import NO_META, Drop, Job, LLMTaskMeta, Outcome, Scheduler, State
from llmq.errors import (
    BudgetExceededError,
    OutOfQuotaError,
    QueueCancelledError,
    QueueClosedError,
    QueueDrainingError,
    QueueDroppedError,
    QueueError,
    QueueFullError,
    QueueTimeout,
)
from llmq.records import AttemptRecord, OperationRecord
from llmq.retry import Kind, Retry, Verdict, error_type_of, judged, outcome_of
from llmq.usage import Tokens, check_tokens, tokens_of
from llmq.waiters import AsyncWaiter, ThreadWaiter, Waiter, new_waiter
from llmq.wire.sent import Place, Sent, enter, leave

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from llmq.queue import LLMQueue
    from llmq.telemetry import OperationSpan

W = TypeVar("W", bound=Waiter)

ABANDONED = Verdict(Kind.CANCELLED)
_MOST_CAUSES = 20
HANDED_SECONDS = (0.5, 8.0)
"""Base and cap of the back-off of the SDKs whose retries are handed over."""

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

    __slots__ = ("_code", "_instruction", "_place", "lease", "queue")

    _code: CodeType
    _instruction: int
    _place: Place | None
    queue: LLMQueue

    async def __aenter__(self) -> Slot:
        if self.state is not _NEW:
            raise RuntimeError("this slot was entered before; ask queue.slot() for another one")
        queue = self.queue
        if not queue._quick or self.meta is not NO_META:
            operation = self._have_operation()
            await operation.enter(self)
            self._place = enter(operation)
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
            if self._place is not None:
                leave(self._place)
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
            _, verdict = self.queue._decide(operation, error, None, 1)
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
        "__weakref__",
        "asked_at",
        "attempts",
        "began_at",
        "closed",
        "depth",
        "drop",
        "handed_retries",
        "held",
        "id",
        "job",
        "lingers",
        "loop",
        "meta",
        "queue",
        "repeatable",
        "running",
        "sent",
        "sleeper",
        "span",
        "started_at",
        "tokens",
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
        self.held: tuple[str | None, float] | None = None
        self.sleeper: Waiter | None = None
        self.asked_at = self.began_at = 0.0
        self.started_at: float | None = None
        self.depth = 0
        self.sent: list[Sent] | None = None
        self.running = self.lingers = self.repeatable = False
        self.handed_retries = 0
        self.tokens: Tokens | None = None
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
            self._check_in(waited=waiter is not None)
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
            self._check_in(waited=waiter is not None)
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
        self.running = False
        if self.queue._scheduler.counts_tokens:
            self._settle_tokens()
        if self.queue._end(self, _SUCCEEDED if verdict is None else verdict.outcome, closing=closing):
            self.record(error, verdict, closing=closing)

    def sending(self, host: str, path: str) -> Sent:
        """Note that a request leaves for this call."""
        sent = Sent(self)
        if self.sent is None:
            self.sent = []
        resend = self.attempts - 1 + len(self.sent)
        self.sent.append(sent)
        if self.span is not None:
            sent.span = self.span.sending(host, path, resend)
            if sent.span is not None:
                sent.request_headers = sent.span.request_headers
        return sent

    def informed(self, verdict: Verdict) -> Verdict:
        """A refusal with what its answer said, where its exception does not tell."""
        seen = self.sent[-1].verdict if self.sent else None
        if seen is None or not (verdict.refused and seen.refused) or verdict.status_code != seen.status_code:
            return verdict
        limit_type = seen.limit_type if verdict.limit_type in (None, "unknown") else verdict.limit_type
        wait = seen.retry_after_seconds if verdict.retry_after_seconds is None else verdict.retry_after_seconds
        return replace(verdict, limit_type=limit_type, retry_after_seconds=wait)

    @property
    def pending(self) -> bool:
        """Whether a request of this attempt is not over."""
        return self.sent is not None and any(sent.ended_at is None for sent in self.sent)

    def handed_retry(self, error: BaseException) -> tuple[Retry | None, Verdict | None]:
        """What a wrapped client would have done, and for which refusal, if the error tells of its request."""
        if not self.handed_retries or not self.sent:
            return None, None
        failed = [sent.verdict for sent in self.sent if sent.failed and sent.verdict is not None]
        for cause in _causes(error) if failed else ():
            status = judged(self.queue._classify, cause).status_code
            for verdict in failed:
                if verdict.retryable and verdict.status_code == status:
                    return Retry(self.handed_retries + 1, *HANDED_SECONDS), verdict
        return None, None

    def note_result(self, result: object) -> None:
        """See what a result says of its tokens, and of retries that nobody saw."""
        queue = self.queue
        if self.sent is None:
            if self.tokens is None and (
                self.span is not None or queue._ledger is not None or queue._scheduler.counts_tokens
            ):
                self.tokens = tokens_of(result)
            retries = getattr(result, "retries_taken", 0)
            if isinstance(retries, int) and retries > 0:
                queue._found_hidden_retries(f"{type(result).__name__} (retries_taken={retries})")

    def refused(self, verdict: Verdict) -> None:
        """A request was refused: the model's waiters are to hear of it also where a client retries by itself."""
        self.queue._hold_back(self, verdict, ended=False)

    def has_ended(self, sent: Sent, *, collected: bool) -> None:
        """A request is over; if it was what the call still lasted for, so is the call, as its streams ended."""
        if sent.late:
            if collected:
                self.queue._orphans.append(functools.partial(self._tell_of, sent, waiters.now()))
            else:
                self._tell_of(sent, waiters.now())
        elif self.lingers and not self.pending:
            if collected:  # perhaps in the middle of anything
                self.abandon()
                return
            broken = next((each for each in self.sent or () if each.streamed and each.verdict is not None), None)
            if broken is None:
                self.leave()
            else:
                self.leave(broken.error, broken.verdict)

    def leave_with_last_byte(self) -> None:
        """End the call as soon as no answer is being read any more; at once, if none is."""
        self.repeatable = False
        if not self.pending:
            self.leave()
            return
        self.lingers = True
        if not self.pending:  # its last byte came in another thread meanwhile
            self.leave()

    def abandon(self, *, in_attempt: bool = True) -> None:
        """End everything from a finaliser."""
        self.queue._orphans.append(functools.partial(self.record_abandoned, waiters.now(), in_attempt=in_attempt))
        self.queue._give_back(self, self.job if in_attempt else None)

    async def back_off(self, delay_seconds: float, verdict: Verdict) -> None:
        """Sleep between attempts, with no slot."""
        queue = self.queue
        self.tokens = None
        if self.span is not None:
            source = "backoff" if verdict.retry_after_seconds is None else "retry_after"
            self.span.retrying(delay_seconds, source)
        try:
            self.sleeper = waiter = new_waiter()
            if self.drop is None:  # cancelled before we lay down
                await waiter.wait(delay_seconds)
            if self.drop is not None:
                raise turned_away(queue, self.drop, self.job)
        except GeneratorExit:
            self.abandon(in_attempt=False)
            raise
        except BaseException as error:
            queue._end(self, Outcome.IGNORED, closing=True)
            self._record_operation(error, judged(queue._classify, error), waiters.now())
            raise
        finally:
            self.sleeper = None

    def record(self, error: BaseException | None, verdict: Verdict | None, *, closing: bool) -> None:
        """Write the attempt's record, and with `closing` the operation's."""
        now = waiters.now()
        if closing and self.span is not None:
            self.span.detach()  # first: what is recorded within a span costs more
        self._record_attempt(error, verdict, now)
        if closing:
            self._record_operation(error, verdict, now)
        if not isinstance(self.job, Slot):
            self.job.operation = None  # type: ignore[attr-defined]  # a Try's; it ends here, with no cycle to be found

    def record_abandoned(self, at: float, *, in_attempt: bool) -> None:
        """Write the records of what ended in a finaliser."""
        if in_attempt:
            self._record_attempt(None, ABANDONED, at)
        self._record_operation(None, ABANDONED, at)

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
            if self.span is not None:
                self.span.asked(self.depth, self.meta.priority.name.lower())
            return asked
        except BaseException as error:
            self.id = self.id or next(queue._scheduler.numbers)  # refused before it had one
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

    def _check_in(self, *, waited: bool) -> None:
        """The wait is over: either we have a slot, or were turned away."""
        job = self.job
        if job.state is not _RUNNING:
            raise turned_away(self.queue, job.drop, job)
        if self.queue._budgeted:  # what the call before it used is only known now
            self.queue._check_door(self.meta)
        self.started_at = now = waiters.now()
        self.running = True
        if self.span is not None:
            self.span.got_slot(self.attempts, max(0.0, now - (job.started_at or now)) if waited else None)

    def _record_attempt(self, error: BaseException | None, verdict: Verdict | None, now: float) -> None:
        """A record for each request that was seen, or else one for the time in the slot.

        A request that goes on although its call is over is told when it ends.
        """
        sent, self.sent = self.sent, None
        attempt = self._new_record(error, verdict, now)
        self.wait_seconds += attempt.wait_seconds
        if self.span is not None:
            self.span.left_slot(attempt)
        if self.tokens is not None:
            attempt.input_tokens, attempt.output_tokens = round(self.tokens.input), round(self.tokens.output)
        if not sent:
            self._tell(attempt)
            return
        self.attempts += len(sent) - 1
        culprit = _culprit(sent, verdict)
        for number, request in enumerate(sent):
            request.number = attempt.attempt + number
            request.before = sent[number - 1] if number else None
            if request.ended_at is not None or verdict is ABANDONED:
                self._tell_of(request, now, attempt if request is culprit else None)
            else:
                request.late = True

    def _tell_of(self, request: Sent, now: float, attempt: AttemptRecord | None = None) -> None:
        """Record a request. `attempt`: how the call ended in its slot, if that was by this request."""
        record = attempt
        if record is None:
            verdict = ABANDONED if request.ended_at is None else request.verdict
            record = self._new_record(request.error, verdict, request.ended_at or now)
        record.attempt = request.number
        _describe(record, request)
        self._tell(record, request)

    def _settle_tokens(self) -> None:
        """Tell the scheduler what the attempt really used, as far as that is known."""
        job = self.job
        if job.used_tokens is not None or self.started_at is None:
            return
        if self.tokens is not None:
            job.used_tokens = sum(self.tokens)
        elif self.sent:
            told = [
                tokens for each in self.sent for tokens in (each.input_tokens, each.output_tokens) if tokens is not None
            ]
            job.used_tokens = sum(told) if told else None

    def _new_record(self, error: BaseException | None, verdict: Verdict | None, ended_at: float) -> AttemptRecord:
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
            ended_at,
            outcome_of(error, verdict),
        )
        if verdict is not None:
            record.status_code = verdict.status_code
            record.limit_type = verdict.limit_type
            record.retry_after_seconds = verdict.retry_after_seconds
            record.error_type = _error_type(error, verdict)
        return record

    def _tell(self, record: AttemptRecord, request: Sent | None = None) -> None:
        """Hand a record to all who keep any."""
        queue = self.queue
        queue._records.ended.append(record)
        if record.outcome == "ok" and record.started_at is not None:
            queue._refusals.succeeded(record.model_name, record.ended_at - record.started_at)
        if queue._ledger is not None:
            queue._book(record)
        if self.span is not None:
            if request is None:
                self.span.attempt_ended(record)
            else:
                self.span.attempt_ended(record, request.span, request.gaps)

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
            outcome_of(error, verdict),
            _error_type(error, verdict),
        )
        self.queue._records.ended.append(record)
        if self.queue._ledger is not None:
            self.queue._ledger.add_operation(record)
        if self.span is not None:
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
    if drop is Drop.QUOTA:
        return OutOfQuotaError(queue._refusals.quota_spent(None if job is None else job.meta.model_name) or "no quota")
    if drop is Drop.BUDGET:
        return BudgetExceededError(queue._over_budget(NO_META if job is None else job.meta) or "no budget")
    if drop is Drop.CLOSED:
        return QueueClosedError("the queue is closed; make another one")
    return QueueDrainingError("the queue refuses new calls since drain(); resume() opens it again")


def _error_type(error: BaseException | None, verdict: Verdict | None) -> str | None:
    """Of a request that was refused without an exception, its status, or what else is known of it."""
    if verdict is None:
        return None
    if error is not None and not isinstance(error, GeneratorExit):
        return error_type_of(error)
    if verdict.kind is Kind.CANCELLED:
        return "abandoned"
    return str(verdict.status_code or verdict.limit_type or verdict.kind.value)


def _culprit(sent: Sequence[Sent], verdict: Verdict | None) -> Sent | None:
    """The request by which a call ended as it did: the last one that failed so, or the last, if that did not fail."""
    if verdict is not None:
        for request in reversed(sent):
            if request.failed and request.verdict is not None and request.verdict.status_code == verdict.status_code:
                return request
    return sent[-1] if sent[-1].verdict is None or verdict is ABANDONED else None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that it was raised from or holds."""
    todo = [error]
    for _ in range(_MOST_CAUSES):
        if not todo:
            return
        each = todo.pop()
        yield each
        todo += [other for other in (each.__cause__, each.__context__) if other is not None]
        if isinstance(each, BaseExceptionGroup):
            todo += each.exceptions


def _describe(record: AttemptRecord, request: Sent) -> None:
    """What was seen of a request."""
    record.seen = True
    before = request.before
    if before is not None:  # it did not wait
        record.submitted_at = record.started_at = request.sent_at
        record.resent = before.failed and before.ended_at is not None and before.ended_at <= request.sent_at
    if request.input_tokens is not None or request.output_tokens is not None:
        record.input_tokens, record.output_tokens = request.input_tokens, request.output_tokens
    record.response_model = request.response_model
    record.limits = request.limits
    if record.status_code is None:
        record.status_code = request.status_code
    if request.first_chunk_at is not None:
        record.first_chunk_seconds = request.first_chunk_at - request.sent_at
