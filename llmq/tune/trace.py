"""A run as a file: what each attempt did and when, without anything of what was asked or answered.

Rules
- JSON lines. The first is a header: format, llmq's version, the level, a note. Then one line an attempt, in the order
  of their ends. Times are seconds since the first submission.
- Never prompts, answers, request ids or service ids. A service is a number, in the order in which services first
  appear, so that a chart can still group by it. Stage and model names are written as they are.
- A key whose value is unknown, or as usual, is left out.
- A bad line is refused with file, line and key. A last line that is not ended was torn by a crash and is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llmq.dialects import RateLimitState
from llmq.errors import ConfigError, InputError
from llmq.generators.jsonl import read_lines
from llmq.records import AttemptRecord, CallOutcome, OperationRecord, RecordList, Records

FORMAT = "llmq trace 1"
_DIGITS = 6
"""Of seconds: microseconds."""

Seconds = Annotated[float, Field(ge=-1e10, le=1e10)]
Amount = Annotated[float, Field(ge=0, le=1e10)]
Count = Annotated[int, Field(ge=0, le=10**9)]
Told = Annotated[float, Field(allow_inf_nan=False)] | None
Limit = Annotated[tuple[str, Told, Told, Told], Field(strict=False)]
"""Dimension, limit, remaining, seconds to the reset, as `RateLimitState` has them."""
M = TypeVar("M", bound=BaseModel)


def _version() -> str:
    try:
        return version("llmq-toolkit")
    except PackageNotFoundError:
        return "unknown"


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal["llmq trace 1"]
    llmq: str
    level: Annotated[int, Field(ge=1)]
    note: str = ""


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    operation: int
    attempt: Annotated[int, Field(ge=1)] = 1
    stage: str | None = None
    model: str | None = None
    service: Count | None = None
    submitted: Seconds
    started: Seconds | None = None
    ended: Seconds
    outcome: CallOutcome = "ok"
    status: int | None = None
    limit_type: str | None = None
    retry_after_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    input_tokens: Count | None = None
    output_tokens: Count | None = None
    first_chunk_seconds: Amount | None = None
    seen: bool = False
    resent: bool = False
    limits: list[Limit] = []

    @model_validator(mode="after")
    def _in_order(self) -> _Line:
        if self.ended < (self.submitted if self.started is None else self.started):
            raise ValueError(f"ended={self.ended} is before it began")
        return self


@dataclass(frozen=True)
class Trace:
    """A recorded run: `level` calls at once were allowed, `attempts` is what happened, in the order of their ends.

    Of an attempt's `service_id` only a number is known, `request_id` and `error_type` are None, and times are seconds
    since the first submission.
    """

    level: int
    attempts: list[AttemptRecord]
    note: str = ""
    version: str = field(default_factory=_version)

    @classmethod
    def from_records(cls, records: Records | Iterable[AttemptRecord], level: int, note: str = "") -> Trace:
        """What a queue of `max_concurrency` = `level` recorded (`queue.records()`). Raises `ConfigError`."""
        if type(level) is not int or level < 1:
            raise ConfigError(f"a trace's level is calls at once, a whole number of at least 1; got {level!r}")
        attempts = list(records.attempts if isinstance(records, Records) else records)
        start = min((a.submitted_at for a in attempts), default=0.0)
        services: dict[str, int] = {}
        return cls(level, [_plain(attempt, start, services) for attempt in attempts], note)

    @classmethod
    def read(cls, path: str | Path) -> Trace:
        """The trace in a file. Raises `InputError`, which names file, line and key."""
        path = Path(path)
        lines = read_lines(path, whole=True)
        first = next(lines, None)
        if first is None:
            raise InputError(f"{path} holds no trace: it has no whole line; record one with write_trace()")
        header = _checked(_Header, path, *first)
        attempts = [_attempt(_checked(_Line, path, number, found)) for number, found in lines]
        return cls(header.level, attempts, header.note, header.llmq)

    def write(self, path: str | Path, *, replace: bool = True) -> None:
        """Write the trace to a file, in place of what is there unless told otherwise. Raises `ConfigError`."""
        header = {"format": FORMAT, "llmq": self.version, "level": self.level, "note": self.note}
        lines = [header, *map(_line, self.attempts)]
        text = "".join(json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n" for line in lines)
        path = Path(path)
        try:
            if replace:
                temporary = path.with_name(path.name + ".tmp")
                temporary.write_text(text, encoding="utf-8")
                temporary.replace(path)
            else:
                with path.open("x", encoding="utf-8") as file:
                    file.write(text)
        except FileExistsError:
            raise ConfigError(f"{path} is there already, so the trace was not written") from None
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror or error}") from None

    def to_records(self) -> Records:
        """Attempts, and the operations that they make up, as a queue would have recorded them."""
        return records_of(self.attempts)


def write_trace(path: str | Path, records: Records | Iterable[AttemptRecord], *, level: int, note: str = "") -> None:
    """Write what a queue recorded (`queue.records()`) as a trace. `level`: calls at once that were allowed.

    No prompts, request ids or service ids are written; `note` is, as it is. Raises `ConfigError`.
    """
    Trace.from_records(records, level, note).write(path)


def records_of(attempts: Iterable[AttemptRecord]) -> Records:
    """Attempts, and the operations that they make up: each ended as its last attempt did."""
    found = Records(RecordList(), RecordList(attempts))
    by_operation: dict[int, list[AttemptRecord]] = {}
    for attempt in found.attempts:
        by_operation.setdefault(attempt.operation_id, []).append(attempt)
    found.operations.extend(map(_operation, by_operation.values()))
    found.operations.sort(key=lambda operation: operation.ended_at)
    return found


def most_at_once(attempts: Sequence[AttemptRecord]) -> int:
    """The most that ran at once of those that started."""
    steps = [(a.started_at, 1) for a in attempts if a.started_at is not None]
    steps += [(a.ended_at, -1) for a in attempts if a.started_at is not None]
    running = most = 0
    for _, step in sorted(steps):
        running += step
        most = max(most, running)
    return most


def _operation(attempts: list[AttemptRecord]) -> OperationRecord:
    last = max(attempts, key=lambda attempt: attempt.ended_at)
    return OperationRecord(
        last.operation_id,
        last.stage,
        last.model_name,
        last.service_id,
        None,
        min(attempt.submitted_at for attempt in attempts),
        last.ended_at,
        len(attempts),
        sum(attempt.wait_seconds for attempt in attempts),
        last.outcome,
    )


def _plain(attempt: AttemptRecord, start: float, services: dict[str, int]) -> AttemptRecord:
    """Without names of whom it was for and without the clock it was on."""
    service = attempt.service_id
    started = attempt.started_at
    return replace(
        attempt,
        service_id=None if service is None else str(services.setdefault(service, len(services))),
        request_id=None,
        error_type=None,
        response_model=None,
        submitted_at=_rounded(attempt.submitted_at - start),
        started_at=None if started is None else _rounded(started - start),
        ended_at=_rounded(attempt.ended_at - start),
        first_chunk_seconds=None if attempt.first_chunk_seconds is None else _rounded(attempt.first_chunk_seconds),
    )


def _rounded(seconds: float) -> float:
    return round(seconds, _DIGITS)


def _line(attempt: AttemptRecord) -> dict[str, Any]:
    try:
        return _as_line(attempt).model_dump(exclude_defaults=True)
    except ValidationError as error:
        raise ConfigError(f"a record cannot be written: {_problems(error)}") from None


def _as_line(attempt: AttemptRecord) -> _Line:
    return _Line(
        operation=attempt.operation_id,
        attempt=attempt.attempt,
        stage=attempt.stage,
        model=attempt.model_name,
        service=None if attempt.service_id is None else int(attempt.service_id),
        submitted=attempt.submitted_at,
        started=attempt.started_at,
        ended=attempt.ended_at,
        outcome=attempt.outcome,
        status=attempt.status_code,
        limit_type=attempt.limit_type,
        retry_after_seconds=attempt.retry_after_seconds,
        input_tokens=attempt.input_tokens,
        output_tokens=attempt.output_tokens,
        first_chunk_seconds=attempt.first_chunk_seconds,
        seen=attempt.seen,
        resent=attempt.resent,
        limits=[(s.dimension, s.limit, s.remaining, s.reset_seconds) for s in attempt.limits],
    )


def _attempt(line: _Line) -> AttemptRecord:
    return AttemptRecord(
        line.operation,
        line.attempt,
        line.stage,
        line.model,
        None if line.service is None else str(line.service),
        None,
        line.submitted,
        line.started,
        line.ended,
        line.outcome,
        line.status,
        line.limit_type,
        line.retry_after_seconds,
        input_tokens=line.input_tokens,
        output_tokens=line.output_tokens,
        first_chunk_seconds=line.first_chunk_seconds,
        seen=line.seen,
        resent=line.resent,
        limits=tuple(RateLimitState(*limit) for limit in line.limits),
    )


def _checked(model: type[M], path: Path, number: int, found: dict[str, Any]) -> M:
    try:
        return model.model_validate(found)
    except ValidationError as error:
        raise InputError(f"{path}, line {number}: {_problems(error)}") from None


def _problems(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
