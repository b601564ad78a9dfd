"""What happened, as plain records: one per operation and one per attempt.

An *operation* is what a caller submits: waiting, attempts and back-off included. An *attempt* is one time that
a slot was asked for and the call run in it. Times are seconds on the clock of the caller's loop: differences
within one loop mean something, nothing else does. Percentiles come from these records, never from histograms.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

if TYPE_CHECKING:
    import pandas as pd

    from llmq.dialects import RateLimitState

CallOutcome = Literal["ok", "error", "cancelled", "rejected", "queue_full", "dropped", "timeout"]
"""ok; error: the call raised; cancelled: by its caller, or by `queue.cancel()`; rejected: refused by the provider;
queue_full: refused at the door; dropped: turned away while it waited, or by a draining or closed queue; timeout."""


@dataclass(slots=True)
class AttemptRecord:
    """One attempt: one request to a provider where those are `seen` (`llmq.wrap`), else one call in a slot.

    `started_at` is None where it never got a slot. `resent`: a client's own retry, in the slot of the request before;
    it did not wait. Tokens are what the provider said it used. `first_chunk_seconds`: from sending to the first piece
    of a streamed answer. `limits`: what the headers of a `seen` answer told of the provider's limits.
    """

    operation_id: int
    attempt: int
    stage: str | None
    model_name: str | None
    service_id: str | None
    request_id: str | None
    submitted_at: float
    started_at: float | None
    ended_at: float
    outcome: CallOutcome
    status_code: int | None = None
    limit_type: str | None = None
    retry_after_seconds: float | None = None
    error_type: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    first_chunk_seconds: float | None = None
    response_model: str | None = None
    seen: bool = False
    resent: bool = False
    limits: tuple[RateLimitState, ...] = ()

    @property
    def wait_seconds(self) -> float:
        """From asking for a slot to having it, or to giving up."""
        return (self.ended_at if self.started_at is None else self.started_at) - self.submitted_at

    @property
    def service_seconds(self) -> float | None:
        """From having the slot to the end; None where it never had one."""
        return None if self.started_at is None else self.ended_at - self.started_at


@dataclass(slots=True)
class OperationRecord:
    """One submitted call, from `submit` to its result. `wait_seconds` sums over its attempts."""

    operation_id: int
    stage: str | None
    model_name: str | None
    service_id: str | None
    request_id: str | None
    submitted_at: float
    ended_at: float
    attempts: int
    wait_seconds: float
    outcome: CallOutcome
    error_type: str | None = None

    @property
    def duration_seconds(self) -> float:
        """Submit to result: waiting, attempts and back-off."""
        return self.ended_at - self.submitted_at


T = TypeVar("T")
R = TypeVar("R", AttemptRecord, OperationRecord)

_DERIVED = {AttemptRecord: ("wait_seconds", "service_seconds"), OperationRecord: ("duration_seconds",)}


class RecordList(list[R], Generic[R]):
    """Records in order of their end."""

    def to_pandas(self) -> pd.DataFrame:
        """A DataFrame with a row a record and a column a field, derived times included. Needs pandas."""
        import pandas as pd

        if not self:
            return pd.DataFrame()
        kind = type(self[0])
        names = [field.name for field in fields(kind)] + list(_DERIVED[kind])
        rows: list[dict[str, Any]] = [{name: getattr(record, name) for name in names} for record in self]
        return pd.DataFrame(rows, columns=names)


@dataclass(slots=True)
class Records:
    """A copy of a queue's record buffers."""

    operations: RecordList[OperationRecord]
    attempts: RecordList[AttemptRecord]


QuickCall = tuple[int, float, float, float]
"""A call with nothing to tell but its times: sequence, submitted, started, ended. No burden to the collector."""


class RecordBuffer:
    """The newest records, in order of their end: at most `size` operations and as many attempts; None: all.

    Appending to `ended` is safe from any thread.
    """

    def __init__(self, size: int | None) -> None:
        self.size = size
        self.ended: deque[OperationRecord | AttemptRecord | QuickCall] = deque(
            maxlen=None if size is None else 2 * size
        )

    def snapshot(self) -> Records:
        """Everything that is kept, copied."""
        found = _as_records(_copied(self.ended))
        if self.size is not None:
            del found.operations[: max(0, len(found.operations) - self.size)]
            del found.attempts[: max(0, len(found.attempts) - self.size)]
        return found

    def since(self, mark: object, most: int) -> tuple[Records, object]:
        """What was appended after `mark` (None: all), of the newest `most`; and the mark for the next call.

        In O(what is returned), since the mark is the last record read and the buffer is read from its end.
        """
        newest = _copied_back_to(mark, self.ended, most)
        return _as_records(newest), newest[-1] if newest else mark


_NOTHING = (None, None, None, None)


def _as_records(ended: Iterable[OperationRecord | AttemptRecord | QuickCall]) -> Records:
    operations: RecordList[OperationRecord] = RecordList()
    attempts: RecordList[AttemptRecord] = RecordList()
    for record in ended:
        if isinstance(record, AttemptRecord):
            attempts.append(record)
        elif isinstance(record, OperationRecord):
            operations.append(record)
        else:
            sequence, at, start, end = record
            operations.append(OperationRecord(sequence, *_NOTHING, at, end, 1, start - at, "ok"))
            attempts.append(AttemptRecord(sequence, 1, *_NOTHING, at, start, end, "ok"))
    return Records(operations, attempts)


def _copied_back_to(mark: object, records: deque[T], most: int) -> list[T]:
    """The newest, oldest first, without `mark` and what came before it."""
    while True:  # as in `_copied`
        try:
            newest = itertools.takewhile(lambda record: record is not mark, itertools.islice(reversed(records), most))
            return list(newest)[::-1]
        except RuntimeError:
            continue


def _copied(records: deque[T]) -> list[T]:
    while True:  # another thread may append while a deque is read, which raises
        try:
            return list(records)
        except RuntimeError:
            continue
