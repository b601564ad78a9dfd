"""The queue: a gate in front of calls to a provider. `submit` runs a call in the caller's own task once a slot is free.

How it works
- `Scheduler` decides, under one lock that is only ever held for a few plain statements: never across an await,
  a call of user code, or a wake-up. After it comes `_after`: wake whom that let start, set the timer, and take back
  what was left in the `_inbox` meanwhile.
- A slot is a lease. A finaliser may end it in the middle of anything, so it only appends to the inbox and takes the
  lock if that is free at once; if not, its holder takes back what is in the inbox. Ending a lease twice does nothing.
- A waiting caller is parked in its own loop or thread and woken once, after the scheduler gave it the slot or turned
  it away. If it was cancelled meanwhile it gives the slot back; if its loop has ended, the wake-up fails and `_after`
  does.
- Back-off holds no slot. A refusal that says Retry-After also holds back all waiters of that model until then.
- What a closed event loop leaves behind, slots and places, is found at the next `_after`, once there has been a caller
  from elsewhere. A `Slot` stays with whoever has it.
- `_quick` says that a slot may go the short way: nobody looks on, and no timer matters.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import fields, replace
from sys import _getframe
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from llmq import waiters
from llmq.alarms import Alarm, new_alarm
from llmq.cards import statistics_card
from llmq.changes import Change, ChangeKind, Changes
from llmq.core import (
    NO_META,
    Cap,
    Depth,
    Drop,
    FairShare,
    Job,
    LLMTaskMeta,
    Outcome,
    Overflow,
    Policy,
    Priority,
    Rate,
    Scheduler,
    State,
    Statistics,
)
from llmq.core.policy import AGEING_SECONDS
from llmq.errors import BudgetExceededError, OutOfQuotaError, QueueClosedError, QueueTimeout
from llmq.interrupt import mind_interrupts
from llmq.items import ItemRun
from llmq.ledger import Ledger
from llmq.logs import tell, tell_of_budget
from llmq.operations import Operation, Retried, Slot, Try
from llmq.progress import Bar, Progress, size_of
from llmq.records import AttemptRecord, RecordBuffer, Records
from llmq.refusals import Refusals
from llmq.retry import Classify, Kind, Retry, Verdict, classify, judged, timed
from llmq.telemetry import Telemetry
from llmq.waiters import Gone, Waiter, in_trio_run, new_waiter, notice_clock, running_loop
from llmq.wire.hidden import retrying_client
from llmq.wire.sent import enter, leave

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

T = TypeVar("T")
R = TypeVar("R")
W = TypeVar("W", bound=Waiter)

LONGEST_HOLD_SECONDS = 3600.0
"""For which a Retry-After is believed."""

LOOKS_FOR_RETRIES = 50
"""How many of its first calls a queue looks at for clients that retry by themselves."""

MAX_RECORDS = 100_000
"""Operations, and attempts, that `records()` keeps."""

QueueState = Literal["open", "paused", "draining", "closed"]

_GIVE_UP = (None, Verdict(Kind.CALLER))
_ROUNDING_SECONDS = 1e-6
_SPREAD_SECONDS = 1.0
_COME_BACK_SECONDS = 0.05
_default_telemetry = Telemetry()
_new_slot = object.__new__
_NEW, _WAITING = State.NEW, State.WAITING


class _Return(NamedTuple):
    """What comes back: an attempt and its operation. Without `job` the operation ends in its back-off; without both
    only a pass was given back."""

    operation: Operation | None
    job: Job | None


class LLMQueue:
    """At most `max_concurrency` calls at once, over all event loops and threads of the process, under any `limits`.

    - `submit` for a coroutine function: one call, from any asyncio or trio task.
    - `slot` for a stream, or whatever is not one awaitable: held until the block ends.
    - `map` for many items: outcomes as they come, no task an item.
    - `submit_sync` for blocking functions, from plain threads.

    `limits` are `Cap` (calls at once, by key), `Rate` (requests or tokens in a time, by key) and `Depth` (calls
    waiting, by key); `max_queued` is short for a `Depth` in all. When that is reached, `overflow` decides: `wait`,
    `reject` (`QueueFullError`) or `drop_oldest` (its caller gets `QueueDroppedError`). Better classes go first, but one
    that has waited `ageing_seconds` gets every fourth start, unless the better one is in `strict`; None: never.
    `fair_share` shares each class between keys.

    `queue_timeout` bounds a wait for a slot, `request_timeout` a call in its slot, each attempt anew; both in
    seconds, None for no bound. `classify` judges exceptions. `telemetry=None` switches spans and metrics off.
    Raises ValueError and TypeError for what cannot be used.
    """

    __slots__ = (
        "__weakref__",
        "_alarms",
        "_backing_off",
        "_budgeted",
        "_classify",
        "_drainers",
        "_hidden_retries",
        "_inbox",
        "_last_home",
        "_leaked",
        "_ledger",
        "_lock",
        "_looks_for_retries",
        "_loops",
        "_mixed",
        "_open",
        "_orphans",
        "_quick",
        "_records",
        "_refusals",
        "_scheduler",
        "_telemetry",
        "_watchers",
        "queue_timeout",
        "request_timeout",
    )

    def __init__(
        self,
        max_concurrency: int = 3,
        *,
        limits: Iterable[Cap | Rate | Depth] = (),
        max_queued: int | None = None,
        overflow: Overflow = "wait",
        ageing_seconds: float | None = AGEING_SECONDS,
        strict: Iterable[Priority] = (),
        fair_share: FairShare | None = None,
        queue_timeout: float | None = None,
        request_timeout: float | None = None,
        classify: Classify = classify,
        telemetry: Telemetry | None = _default_telemetry,
        ledger: Ledger | None = None,
        max_records: int | None = MAX_RECORDS,
    ) -> None:
        self.queue_timeout = _positive("queue_timeout", queue_timeout)
        self.request_timeout = _positive("request_timeout", request_timeout)
        depth = () if max_queued is None else (Depth(max_queued),)
        policy = Policy(max_concurrency, (*limits, *depth), overflow, ageing_seconds, frozenset(strict), fair_share)
        notice_clock()
        mind_interrupts()
        self._classify = classify
        self._telemetry = telemetry
        self._ledger = ledger
        self._budgeted = ledger is not None and bool(ledger.budgets)
        self._looks_for_retries = LOOKS_FOR_RETRIES
        self._hidden_retries: set[str] = set()
        self._refusals = Refusals()
        self._records = RecordBuffer(max_records)
        self._scheduler = Scheduler(policy)
        self._lock = threading.Lock()
        self._inbox: deque[_Return] = deque()
        self._orphans: deque[Callable[[], None]] = deque()
        self._leaked: deque[str] = deque()
        self._open: set[Operation] = set()
        self._backing_off: set[Operation] = set()
        self._drainers: list[Waiter] = []
        self._watchers: list[Changes] = []
        self._alarms: dict[int, Alarm] = {}
        self._last_home: object = self  # nobody's
        self._loops: set[weakref.ref[AbstractEventLoop]] = set()
        self._mixed = False  # callers of more than one loop, or of none: a dead loop may be found by others
        self._quick = False
        self._look_for_short_way()
        if telemetry is not None:
            telemetry.watch(self)

    @property
    def max_concurrency(self) -> int:
        """The cap in force."""
        return self._scheduler.limit

    @property
    def state(self) -> QueueState:
        """`open`; `paused`; `draining`: refuses new calls, from `drain` to `resume`; `closed`: for good."""
        refusing = self._scheduler.refusing
        if refusing is not None:
            return "closed" if refusing is Drop.CLOSED else "draining"
        return "paused" if self._scheduler.paused else "open"

    @property
    def policy(self) -> Policy:
        """The limits and the order in force."""
        return self._scheduler.policy

    @property
    def ledger(self) -> Ledger | None:
        """What calls used and cost, where that is kept."""
        return self._ledger

    @property
    def hidden_retries(self) -> tuple[str, ...]:
        """Clients found to retry by themselves, unseen: what they had refused is not counted anywhere."""
        return tuple(sorted(self._hidden_retries))

    @property
    def open_operations(self) -> int:
        """Calls accepted and not yet ended: waiting, running, or sleeping between attempts."""
        self._after()
        return self._count_open()

    async def submit(
        self,
        factory: Callable[[], Awaitable[T]],
        *,
        meta: LLMTaskMeta | None = None,
        retry: Retry | None = None,
    ) -> T:
        """Await `factory()` in this task once a slot is free; its result or exception passes unchanged.

        Without `retry` it is called once, unless the request of a wrapped client fails, whose own retries the queue
        takes over (`llmq.wrap`). With it, each attempt takes a new slot at the front of its class, and no slot is held
        in between. A call that returns a stream of a wrapped client holds its slot until the last byte. Raises, of its
        own, `QueueTimeout`, `RequestTimeout`, and the `QueueError` that says why it was turned away: full, dropped,
        cancelled, draining, closed, halted (out of budget or quota).

        Do not submit from within a call that holds a slot: when all slots are held that way, none becomes free.
        """
        operation = Operation(self, meta or NO_META, running_loop())
        operation.repeatable = True
        if self._looks_for_retries:
            self._look_for_retries(factory)
        place = enter(operation)
        failed = 0
        try:
            while True:
                await operation.enter(Retried(operation) if failed else Try(operation))
                if operation.span is not None:
                    operation.span.attach()
                try:
                    result = await (factory() if self.request_timeout is None else timed(factory, self.request_timeout))
                except BaseException as error:
                    failed += 1
                    delay, verdict = self._decide(operation, error, retry, failed)
                    self._hold_back(operation, verdict, delay)  # first, so that the slot goes to no other of this model
                    operation.leave(error, verdict, closing=delay is None)
                    if delay is None:
                        raise
                else:
                    operation.note_result(result)
                    operation.leave_with_last_byte()
                    return result
                await operation.back_off(delay, verdict)
        finally:
            leave(place)
            if operation.span is not None:
                operation.span.detach()

    def slot(self, meta: LLMTaskMeta | None = None) -> Slot:
        """A slot to hold for a block: `async with queue.slot(): ...`. No time-out applies inside it."""
        slot = _new_slot(Slot)
        slot.queue = self
        slot.meta = NO_META if meta is None else meta
        slot.state = _NEW
        slot.operation = slot.lease = slot._place = None
        frame = _getframe(1)
        slot._code = frame.f_code
        slot._instruction = frame.f_lasti
        return slot

    def map(
        self,
        call: Callable[[T], Awaitable[R]],
        items: Iterable[T] | AsyncIterable[T],
        *,
        meta: LLMTaskMeta | Callable[[T], LLMTaskMeta] | None = None,
        ordered: bool = False,
        retry: Retry | None = None,
        progress: bool = False,
    ) -> ItemRun[T, R]:
        """`call(item)` for each item, pulled as slots free up; an outcome each, with `.result` or `.error`.

        `async with queue.map(...) as outcomes: async for outcome in outcomes: ...`; on asyncio also plain
        `async for`. `items` may be lazy, asynchronous or endless. `ordered` keeps the order of the items. Calls share
        a few tasks, so a context variable that one sets may be seen by a later one. `progress` shows a bar, in a
        terminal, a notebook or a log (`llmq.progress`).
        """
        bar = Bar("calls", size_of(items))
        shown = Progress([bar]) if progress else None

        async def run_one(_index: int, item: T) -> R:
            def start() -> Awaitable[R]:
                run.grow()
                return call(item) if shown is None else bar.attempt(call(item))

            with nullcontext() if shown is None else shown.counted(bar):
                return await self.submit(start, meta=meta(item) if callable(meta) else meta, retry=retry)

        # One item more than there are slots: the one that waits finds out at once when the queue has grown.
        run = ItemRun(run_one, items, lambda: self._scheduler.limit + 1, ordered=ordered, progress=shown)
        return run

    def submit_sync(self, fn: Callable[..., T], *args: object, meta: LLMTaskMeta | None = None) -> T:
        """Call `fn(*args)` in this thread once a slot is free; blocks. Not from a thread that runs an event loop.

        `request_timeout` does not apply: a blocking function cannot be stopped from outside.
        """
        if running_loop() is not None or in_trio_run():
            raise RuntimeError(
                "submit_sync() would block the event loop that runs in this thread; use `await queue.submit(...)`"
            )
        operation = Operation(self, meta or NO_META, None)
        place = enter(operation)
        try:
            operation.enter_blocking(Try(operation))
            if operation.span is not None:
                operation.span.attach()
            try:
                result = fn(*args)
            except BaseException as error:
                _, verdict = self._decide(operation, error, None, 1)
                self._hold_back(operation, verdict)
                operation.leave(error, verdict)
                raise
            operation.note_result(result)
            operation.leave_with_last_byte()
            return result
        finally:
            leave(place)
            if operation.span is not None:
                operation.span.detach()

    def resize(self, max_concurrency: int) -> None:
        """Change the cap. Running calls keep their slots, so a lower cap is reached as they end."""
        self.reconfigure(max_concurrency=max_concurrency)

    def reconfigure(self, **changes: Any) -> None:
        """Change `max_concurrency`, `limits`, `max_queued`, `overflow`, `ageing_seconds`, `strict` or `fair_share`.

        What is not named stays. Nothing is lost: who waits keeps its place, who runs counts under the new limits, and
        what a rate has given out stays given out. `max_queued` stands for the `Depth` in all among the limits.
        Raises TypeError and ValueError, and then nothing has changed.
        """
        kind: ChangeKind = "resized" if set(changes) == {"max_concurrency"} else "reconfigured"
        with self._changing() as (scheduler, woken):
            policy = _changed(scheduler.policy, changes)
            woken += (
                scheduler.resize(policy.max_concurrency, waiters.now())
                if kind == "resized"
                else scheduler.reconfigure(policy, waiters.now())
            )
        self._announce(kind)

    def pause(self) -> None:
        """Start nothing more until `resume`. Running calls go on."""
        with self._changing() as (scheduler, woken):
            woken += scheduler.pause(True, waiters.now())
        self._announce("paused")

    def resume(self) -> None:
        """Undo `pause` and `drain`, and forget refusals. Raises `QueueClosedError` after `close`."""
        self._refusals.forget()
        with self._changing() as (scheduler, woken):
            if scheduler.refusing is Drop.CLOSED:
                raise QueueClosedError("the queue is closed, which is for good; make another one")
            woken += scheduler.refuse(None, waiters.now())
            woken += scheduler.pause(False, waiters.now())
        self._announce("resumed")

    def cancel(self, **where: str | None) -> int:
        """Cancel waiting calls: all, or those whose meta has these fields or labels. Returns how many.

        `queue.cancel(request_id="r-17")`, `queue.cancel(model_name="m", agent="writer")`. Their callers get
        `QueueCancelledError`. Calls that sleep before another attempt count as waiting. A running call belongs to its
        task: cancel that.
        """

        def chosen(meta: LLMTaskMeta) -> bool:
            return all(meta.value_of(name) == value for name, value in where.items())

        with self._changing() as (scheduler, woken):
            jobs = [job for job in scheduler.jobs() if chosen(job.meta)]
            woken += scheduler.drop(jobs, Drop.CANCELLED, waiters.now())
            asleep = self._rouse(Drop.CANCELLED, chosen)
        return len(jobs) + asleep

    async def drain(self, timeout: float | None = None) -> None:
        """Refuse new calls, let those accepted finish (a pause ends), and return when none is left.

        Raises `QueueTimeout` when that takes longer than `timeout` seconds; the calls go on, and new ones stay
        refused until `resume`. Callers at the door of a full queue were not accepted, and get `QueueDrainingError`.
        """
        waiter = new_waiter()
        with self._changing() as (scheduler, woken):
            self._drainers.append(waiter)
            if scheduler.refusing is not Drop.CLOSED:
                woken += scheduler.refuse(Drop.DRAINING, waiters.now())
            woken += scheduler.pause(False, waiters.now())
        self._announce("draining")
        try:
            drained = await waiter.wait(timeout)
        finally:
            with suppress(ValueError):
                self._drainers.remove(waiter)
        if not drained:
            raise QueueTimeout(
                f"{self._count_open()} calls were still open after drain(timeout={timeout:g}); they go on; "
                "wait again, cancel() those that wait, or cancel their tasks"
            )

    def close(self) -> None:
        """Turn every waiting caller away with `QueueClosedError`, and all that come; for good. Running calls go on."""
        with self._changing() as (scheduler, woken):
            woken += scheduler.refuse(Drop.CLOSED, waiters.now())
            self._rouse(Drop.CLOSED, lambda meta: True)
        self._announce("closed")
        for watcher in list(self._watchers):
            watcher.close()

    def statistics(self) -> Statistics:
        """Counts of attempts now: in all, by class and by key. Changes nothing."""
        self._bury_orphans()
        self._after()
        with self._locked() as scheduler:
            found = scheduler.statistics(waiters.now())
        time.sleep(0)  # locks are not fair: whoever reads without a pause lets those who call have theirs
        return found

    def explain(self, request: str | Slot | None = None) -> str:
        """Why a call waits, in words: by its `request_id`, by its slot, or of the one that waits longest.

        >>> LLMQueue().explain()
        'nothing waits'
        """
        with self._locked() as scheduler:
            now = waiters.now()
            if isinstance(request, Slot):
                return "was not asked for yet" if request.state is State.NEW else scheduler.explain(request, now)
            jobs = list(scheduler.jobs())
            if request is None:
                oldest = min(jobs, key=lambda job: job.sequence, default=None)
                return "nothing waits" if oldest is None else scheduler.explain(oldest, now)
            jobs += [operation.job for operation in self._open if operation not in self._backing_off]
            found = [job for job in jobs if job.meta.request_id == request]
            if found:
                return scheduler.explain(found[0], now)
            if scheduler.runs(request):
                return "runs"
            asleep = [operation for operation in self._backing_off if operation.meta.request_id == request]
            return "sleeps before its next attempt" if asleep else f"no open call has the request_id {request!r}"

    def changes(self, size: int = 1000) -> Changes:
        """The changes of state from now on, as an async iterator; see `Changes`."""
        watcher = Changes(size, self._forget_watcher)
        with self._locked() as scheduler:
            if scheduler.refusing is Drop.CLOSED:
                watcher.end()
            else:
                self._watchers = [*self._watchers, watcher]
                self._look_for_short_way()
        return watcher

    def gauges(self) -> tuple[dict[str, int], dict[str, int]]:
        """Limits on calls at once by key ("" for all together), and waiting calls by class. For telemetry."""
        with self._lock:
            limits = {"": self._scheduler.limit}
            for cap in self._scheduler.policy.limits:
                if isinstance(cap, Cap):
                    limits |= {f"{cap.by}={key}": limit for key, limit in cap.overrides.items()}
                    limits[cap.by or "cap"] = cap.limit
            counts = self._scheduler.waiting_by_class()
        return limits, {priority.name.lower(): count for priority, count in counts.items()}

    def settle(self) -> None:
        """Tell telemetry and `records` of what ended in a finaliser since the last call."""
        self._bury_orphans()

    def records(self) -> Records:
        """The newest operations and attempts, oldest first: at most `max_records` of each, all where that is None."""
        self._bury_orphans()
        return self._records.snapshot()

    def records_since(self, mark: object = None, *, most: int = 10_000) -> tuple[Records, object]:
        """What ended since the call that returned `mark`, of the newest `most` records; and the next mark.

        For who looks again and again: it costs as much as is new. Operations and attempts count as records each.
        """
        self._bury_orphans()
        return self._records.since(mark, most)

    def _repr_html_(self) -> str:
        why = self.explain()
        more = [("state", self.state), *([] if why == "nothing waits" else [("the oldest waiter", why)])]
        return statistics_card(self.statistics(), "LLMQueue", more)

    def __repr__(self) -> str:
        now = self.statistics()
        return f"<LLMQueue {now.in_flight} of {now.limit} in flight, {now.waiting} waiting>"

    # What operations and slots use.

    def _ask(
        self, operation: Operation, job: Job, make_waiter: Callable[[], W], now: float
    ) -> tuple[Sequence[Job], W | None]:
        """Submit an operation's next attempt. A waiter: it must wait there."""
        if self._budgeted or self._refusals.any_quota:
            self._check_door(operation.meta)
        with self._lock:
            operation.depth = self._scheduler.waiting
            if operation.held is not None:
                self._scheduler.let_back(*operation.held, now)
                operation.held = None
            woken, waiter, failure = self._submit(job, now, make_waiter)
            self._backing_off.discard(operation)
            if not isinstance(job, Slot):  # which must not be kept from collection
                self._open.add(operation)
            if operation.loop is not None and operation.loop not in self._loops:
                self._note_loop(operation.loop)
        if failure is not None:
            self._after(woken)
            raise failure
        at_once: ChangeKind = "started" if job.state is State.RUNNING else "dropped"
        self._publish(at_once if waiter is None else "waiting", job)
        return woken, waiter

    def _submit(
        self, job: Job, now: float, make_waiter: Callable[[], W]
    ) -> tuple[Sequence[Job], W | None, BaseException | None]:
        """Under the lock: hand a job in. Whom to wake; where its caller must wait, if so; why that cannot be."""
        woken = self._scheduler.submit(job, now)
        if job.state is not _WAITING:
            return woken, None, None
        try:
            return woken, self._park(job, make_waiter), None
        except BaseException as error:
            return [*woken, *self._scheduler.cancel(job, now)], None, error

    def _park(self, job: Job, make_waiter: Callable[[], W]) -> W:
        """A place for the caller of a waiting job, and a timer where it waits."""
        job.waiter = waiter = make_waiter()
        home = waiter.home
        if home is self._last_home and self._alarms:
            return waiter
        self._last_home = home
        alarm = self._alarms.get(id(home))
        if alarm is None or not alarm.is_in(home):
            self._alarms = {key: each for key, each in self._alarms.items() if not each.is_gone()}
            self._alarms[id(home)] = new_alarm(self._ring)
            if home is not None and (loop := running_loop()) is home and loop is not None:
                self._note_loop(weakref.ref(loop))
            else:
                self._mixed = True
        return waiter

    def _note_loop(self, loop: weakref.ref[AbstractEventLoop]) -> None:
        self._loops.add(loop)
        self._mixed = self._mixed or len(self._loops) > 1

    def _end(self, operation: Operation, outcome: Outcome, *, closing: bool) -> bool:
        """End an operation's attempt, if it is in one, and with `closing` the operation. False: it was ended before."""
        job = operation.job
        now = waiters.now()
        woken: Sequence[Job] | None = None
        with self._lock:
            if operation.closed:
                return False
            operation.closed = closing
            if operation in self._backing_off:
                self._backing_off.discard(operation)
            elif operation.started_at is None:
                woken = self._scheduler.cancel(job, now)
            else:
                woken = self._scheduler.finish(job, outcome, now)
                if woken is None:
                    return False
            if closing:
                self._open.discard(operation)
            elif operation in self._open:
                self._backing_off.add(operation)
        self._after(woken or ())
        if self._watchers and operation.started_at is not None:
            self._publish("ended", job)
        return True

    def _give_back(self, operation: Operation | None, job: Job | None) -> None:
        """End an operation, if there is one, from a finaliser: never waits for the lock."""
        self._inbox.append(_Return(operation, job))
        while self._inbox and self._lock.acquire(blocking=False):
            try:
                woken = self._empty_inbox()
                drained, late = self._drained(), self._too_late_alarms()
            finally:
                self._lock.release()
            self._wake(woken)
            self._tell_time(drained, late)

    def _after(self, woken: Sequence[Job] = ()) -> None:
        """What follows on every change: wake, take back what came meanwhile, and set the timer."""
        self._wake(woken)
        if self._mixed:
            self._notice_dead_loops()
        while True:
            while self._inbox:
                with self._lock:
                    started = self._empty_inbox()
                self._wake(started)
            if self._drainers or self._scheduler.alarms or (not self._quick and self._telemetry is None):
                with self._lock:
                    drained, late = self._drained(), self._too_late_alarms()
                    self._look_for_short_way()
                self._tell_time(drained, late)
            if not self._inbox:  # a finaliser may have met the lock taken just now
                return

    def _recall(self) -> None:
        """Give the passes that came back to those who wait for them."""
        if not self._lock.acquire(blocking=False):  # its holder, whom a finaliser that runs this may have interrupted
            self._give_back(None, None)  # does it afterwards
            return
        try:
            woken = self._scheduler.recall(waiters.now())
        finally:
            self._lock.release()
        self._after(woken)

    def _decide(
        self, operation: Operation, error: BaseException, retry: Retry | None, failed: int
    ) -> tuple[float | None, Verdict]:
        """Seconds until the next attempt, or None, and what the error means. Never raises: a slot depends on it."""
        try:
            verdict = operation.informed(judged(self._classify, error))
            cause: Verdict | None = verdict
            if retry is None:
                retry, cause = operation.handed_retry(error)
            delay = None
            if retry is not None and cause is not None:
                delay = retry.delay_seconds(failed, self._believed(operation, cause))
            return self._refusals.decide(operation.meta.model_name, verdict, delay, error), verdict
        except Exception:
            return _GIVE_UP

    def _believed(self, operation: Operation, verdict: Verdict) -> Verdict:
        """A verdict with a Retry-After that can be true: a place among so many at once is free after one call. And none
        that stops a model for good: after an hour it may be asked again."""
        said = verdict.retry_after_seconds
        if said is None:
            return verdict
        most = LONGEST_HOLD_SECONDS
        if verdict.limit_type == "concurrency":
            most = self._refusals.typical_seconds(operation.meta.model_name)
        return replace(verdict, retry_after_seconds=min(said, most))

    def _hold_back(
        self, operation: Operation, verdict: Verdict, delay_seconds: float | None = None, *, ended: bool = True
    ) -> None:
        """Keep the model's waiters back, if the provider said for how long: until the refused call is back itself,
        jitter included, or as long as was said if it does not come back. Longer, if it refuses on and on; that is
        counted once, when the attempt has `ended` with it."""
        if not verdict.refused:
            return
        said = self._believed(operation, verdict).retry_after_seconds
        seconds = 0.0 if said is None else said
        if seconds and delay_seconds is not None:
            seconds = delay_seconds + _COME_BACK_SECONDS  # who is held back would else be first; see `let_back`
        pause = self._refusals.pause_seconds(operation.meta.model_name) if ended else 0.0
        seconds = max(seconds, pause)
        quota = verdict.kind is Kind.QUOTA
        if seconds <= 0 and not quota:
            return
        with self._changing() as (scheduler, woken):
            now = waiters.now()
            model = scheduler.model_of(operation.job)
            if seconds > 0:
                spread = min(_SPREAD_SECONDS, seconds)
                woken += scheduler.hold(model, now + seconds, now, spread_seconds=spread)
                operation.held = None if delay_seconds is None else (model, now + seconds)
            if quota:
                woken += scheduler.drop(
                    [job for job in scheduler.jobs() if scheduler.model_of(job) == model], Drop.QUOTA, now
                )
                self._rouse(Drop.QUOTA, lambda meta: meta.model_name == model)
        self._publish("held", operation.job)
        _tell_of_hold(model, verdict, seconds, pause)

    def _bury_orphans(self) -> None:
        """Tell of what ended in a finaliser, which must not do so itself: telemetry and logging take locks."""
        while self._orphans:
            try:
                record = self._orphans.popleft()
            except IndexError:  # another thread was quicker
                break
            record()
        while self._leaked:
            with suppress(IndexError):
                tell(
                    logging.WARNING,
                    "leaked",
                    "%s was never given back, and was collected; use `async with`, or release() it",
                    self._leaked.popleft(),
                )

    def _book(self, record: AttemptRecord) -> None:
        """Add what an attempt used; where that spends a budget, turn away those who wait for it."""
        assert self._ledger is not None
        for event in self._ledger.add_attempt(record):
            tell_of_budget(event)
            if event.share >= 1.0:
                with self._changing() as (scheduler, woken):
                    late = [job for job in scheduler.jobs() if self._over_budget(job.meta)]
                    woken += scheduler.drop(late, Drop.BUDGET, waiters.now())

    def _over_budget(self, meta: LLMTaskMeta) -> str | None:
        return None if self._ledger is None else self._ledger.check(meta)

    def _check_door(self, meta: LLMTaskMeta) -> None:
        if (why := self._over_budget(meta)) is not None:
            raise BudgetExceededError(why)
        if (why := self._refusals.quota_spent(meta.model_name)) is not None:
            raise OutOfQuotaError(why)

    def _look_for_retries(self, call: object) -> None:
        """Look at one of the first calls for a client that retries by itself. Never raises."""
        self._looks_for_retries -= 1
        try:
            found = retrying_client(call)
        except Exception:
            return
        if found is not None:
            self._found_hidden_retries(found)

    def _found_hidden_retries(self, client: str) -> None:
        if client not in self._hidden_retries and len(self._hidden_retries) < LOOKS_FOR_RETRIES:
            self._hidden_retries.add(client)
            tell(
                logging.WARNING,
                "hidden_retries",
                "%s retries by itself, where the queue does not see it: refusals are hidden, and its retries multiply "
                "those of the queue. Hand them over with llmq.wrap(client), or switch them off with max_retries=0",
                client,
            )

    # Private.

    @contextmanager
    def _locked(self) -> Iterator[Scheduler]:
        try:
            with self._lock:
                yield self._scheduler
        finally:
            self._after()

    @contextmanager
    def _changing(self) -> Iterator[tuple[Scheduler, list[Job]]]:
        """The scheduler under the lock, and a list for those to be woken afterwards."""
        woken: list[Job] = []
        try:
            with self._lock:
                yield self._scheduler, woken
                self._look_for_short_way()
        finally:
            self._after(woken)

    def _look_for_short_way(self) -> None:
        self._quick = (
            self._telemetry is None
            and self._ledger is None
            and not self._watchers
            and not self._drainers
            and not self._scheduler.uses_time
        )

    def _count_open(self) -> int:
        return self._scheduler.in_flight + self._scheduler.waiting + len(self._backing_off)

    def _empty_inbox(self) -> list[Job]:
        woken: list[Job] = []
        now = waiters.now()
        while self._inbox:
            operation, job = self._inbox.popleft()
            if operation is None:
                continue
            if job is None:
                self._backing_off.discard(operation)
            elif job.state is State.WAITING or operation.started_at is None:
                woken += self._scheduler.cancel(job, now)
            else:
                woken += self._scheduler.finish(job, Outcome.IGNORED, now) or ()
            self._open.discard(operation)
        woken += self._scheduler.recall(now)
        return woken

    def _wake(self, woken: Sequence[Job]) -> None:
        for job in woken:
            waiter: Waiter = job.waiter  # type: ignore[assignment]  # the core keeps it as an opaque object
            try:
                waiter.wake()
            except Gone:
                self._lose(job)
            if self._watchers:
                self._publish("dropped" if job.drop else "started", job)

    def _lose(self, job: Job) -> None:
        """Take back what was meant for a caller whose loop has ended."""
        assert isinstance(job, Try)
        self._inbox.append(_Return(job.operation or Operation(self, job.meta, None), job))

    def _drained(self) -> list[Waiter]:
        """Under the lock: who waits for the queue to be empty, if it is."""
        if not self._drainers or self._count_open():
            return []
        drainers, self._drainers = self._drainers, []
        return drainers

    def _notice_dead_loops(self) -> None:
        """Take back what belongs to closed loops."""
        dead = {ref for ref in list(self._loops) if (loop := ref()) is None or loop.is_closed()}
        if not dead:
            return
        with self._lock:
            self._loops -= dead
            self._inbox.extend(
                _Return(operation, None if operation in self._backing_off else operation.job)
                for operation in self._open
                if operation.loop in dead
            )

    def _rouse(self, drop: Drop, chosen: Callable[[LLMTaskMeta], bool]) -> int:
        """Turn away those that sleep before another attempt. Returns how many."""
        asleep = [operation for operation in self._backing_off if chosen(operation.meta)]
        for operation in asleep:
            operation.drop = drop
            if operation.sleeper is not None:
                with suppress(Gone):
                    operation.sleeper.wake()
        return len(asleep)

    def _too_late_alarms(self) -> list[Alarm]:
        """Under the lock: the alarms that would ring after the scheduler's deadline, set to it."""
        deadline = self._scheduler.deadline
        if deadline is None:
            return []
        late = [alarm for alarm in self._alarms.values() if alarm.at > deadline]
        for alarm in late:
            alarm.at = deadline
        return late

    def _tell_time(self, drained: list[Waiter], alarms: list[Alarm]) -> None:
        for drainer in drained:
            with suppress(Gone):
                drainer.wake()
        for alarm in alarms:
            with suppress(Gone):  # nobody waits there any more; it is forgotten when another loop comes
                alarm.start()

    def _ring(self, alarm: Alarm, at: float) -> None:
        """It is time; or nearly so, where a loop rounds it."""
        now = waiters.now()
        with self._lock:
            alarm.at = math.inf
            woken = self._scheduler.tick(at if now < at < now + _ROUNDING_SECONDS else now)
        self._after(woken)

    def _announce(self, kind: ChangeKind) -> None:
        """Publish and log what happened to the whole queue."""
        self._publish(kind)
        now = self._scheduler
        tell(
            logging.INFO,
            kind,
            "queue %s: %d of %d in flight, %d waiting",
            kind,
            now.in_flight,
            now.limit,
            now.waiting,
            in_flight=now.in_flight,
            waiting=now.waiting,
            limit=now.limit,
        )

    def _publish(self, kind: ChangeKind, job: Job | None = None) -> None:
        if not self._watchers:
            return
        scheduler = self._scheduler
        change = Change(kind, waiters.now(), scheduler.in_flight, scheduler.waiting, scheduler.limit)
        if job is not None:
            meta = job.meta
            change = replace(
                change,
                sequence=job.sequence,
                stage=meta.stage,
                model_name=meta.model_name,
                service_id=meta.service_id,
                request_id=meta.request_id,
            )
        for watcher in list(self._watchers):
            watcher.add(change)

    def _forget_watcher(self, watcher: Changes) -> None:
        with self._locked():
            self._watchers = [other for other in self._watchers if other is not watcher]
            self._look_for_short_way()


def _tell_of_hold(model: str | None, verdict: Verdict, seconds: float, pause_seconds: float) -> None:
    fields = {"model_name": model, "limit_type": verdict.limit_type, "seconds": seconds}
    if verdict.kind is Kind.QUOTA:
        tell(logging.WARNING, "quota", "model %s is out of quota: no call to it starts", model, **fields)
    elif pause_seconds > 0:
        text = "model %s refuses on and on: its calls are held back for %.1f s, and refusals are not tried again"
        tell(logging.WARNING, "breaker", text, model, seconds, **fields)
    else:
        text = "model %s refused (limit on %s): its calls are held back for %.1f s"
        tell(logging.INFO, "held", text, model, verdict.limit_type, seconds, **fields)


def _changed(policy: Policy, changes: dict[str, Any]) -> Policy:
    known = [*(field.name for field in fields(Policy)), "max_queued"]
    unknown = [name for name in changes if name not in known]
    if unknown:
        raise TypeError(f"a queue has no {', '.join(unknown)} to change; it has {', '.join(known)}")
    changes = dict(changes)
    if "limits" in changes:
        changes["limits"] = tuple(changes["limits"])
    if "strict" in changes:
        changes["strict"] = frozenset(changes["strict"])
    if "max_queued" in changes:
        most = changes.pop("max_queued")
        others = tuple(
            limit
            for limit in changes.get("limits", policy.limits)
            if not isinstance(limit, Depth) or limit.by is not None
        )
        changes["limits"] = others if most is None else (*others, Depth(most))
    return replace(policy, **changes)


def _positive(name: str, seconds: float | None) -> float | None:
    if seconds is not None and not seconds > 0:
        raise ValueError(f"{name} must be more than 0 seconds, or None for no bound; got {seconds}")
    return None if seconds == math.inf else seconds
