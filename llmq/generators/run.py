"""Services in, records out: every service ends up in exactly one of OUT and OUT.quarantine.jsonl.

Beside OUT stands OUT.calls.jsonl, a line for each call that was sent (service and stage, nothing else). It is how a
resumed run knows which calls are paid for a second time. A line is written whole or, if the process is killed
within it, cut off by the next `resume`. What the calls used, cost and waited is in OUT.report.json and OUT.report.html,
also of a run that was interrupted or broke. Where nothing more can be started (no budget, no quota), the run stops, and
who was not done is left; where only one service's budget is used up, that service is.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from llmq.core import LLMTaskMeta
from llmq.errors import ConfigError, InputError, OutOfQuotaError, QueueHaltedError
from llmq.generators.ambitions import ambitions_pipeline, ambitions_record
from llmq.generators.conversation import AnswerCache, SessionContext, Transcript
from llmq.generators.jsonl import drop_torn_line, read_lines, write_line
from llmq.generators.plateaus import ServiceItem, plateau_pipeline, plateau_record
from llmq.generators.services import Catalogues, Service
from llmq.ledger import Ledger
from llmq.logs import tell
from llmq.providers.chat import ChatClient
from llmq.retry import describe
from llmq.runtime import active_queue
from llmq.settings import Settings
from llmq.summary import RunSummary

GeneratorName = Literal["plateaus", "ambitions"]
_LINE_START = b'{"service_id": "'
_GENERATORS = {
    "plateaus": (plateau_pipeline, plateau_record),
    "ambitions": (ambitions_pipeline, ambitions_record),
}


@dataclass
class RunReport:
    """What came of a run. `calls` and `calls_paid_twice` count over the life of OUT, resumed runs included.

    `halted` says why it stopped early, with `left` services still to do. `summary` is of this run alone.
    """

    out: Path
    quarantine: Path
    finished: int = 0
    quarantined: int = 0
    skipped: int = 0
    calls: int = 0
    calls_paid_twice: int = 0
    seconds: float = 0.0
    left: int = 0
    halted: str | None = None
    summary: RunSummary | None = None

    def __str__(self) -> str:
        parts = [f"{self.finished} services finished in {self.seconds:.1f} s: {self.out}"]
        if self.skipped:
            parts.append(f"{self.skipped} were there already")
        if self.quarantined:
            parts.append(f"{self.quarantined} failed: {self.quarantine} (--resume tries them again)")
        if self.halted is not None:
            parts.append(f"Stopped, with {self.left} left to do (--resume goes on): {self.halted}")
        parts.append(f"{self.calls} calls sent, {self.calls_paid_twice} of them paid twice by interruptions or retries")
        if self.summary is not None:
            parts += ["", str(self.summary)]
        return "\n".join(parts)


async def run_services(
    services: list[Service],
    out: Path,
    *,
    client: ChatClient,
    catalogues: Catalogues,
    settings: Settings,
    generator: GeneratorName = "plateaus",
    resume: bool = False,
    on_done: Callable[[RunReport], None] = lambda report: None,
    ledger: Ledger | None = None,
) -> RunReport:
    """Generate a record for each service, through the queue in force. `on_done` hears after each service.

    `ledger` counts what is sent without a queue; default: a new one of the settings.

    Raises `InputError` if OUT is there and `resume` is not set, or another run writes to it.
    """
    started_at = time.monotonic()
    files = _Files(out, generator)
    _check_folders(settings)
    make_pipeline, make_record = _GENERATORS[generator]
    pipeline = make_pipeline(client, catalogues)
    queue = active_queue()
    if queue is not None and queue.ledger is not None:
        ledger = queue.ledger
    elif ledger is None:
        ledger = settings.ledger()
    with (
        files.opened({service.service_id for service in services}, resume=resume) as handles,
        files.reporting(ledger, started_at),
    ):
        left = [service for service in services if service.service_id not in handles.done]
        report = RunReport(out, files.quarantine, skipped=len(services) - len(left))
        halted, anybody = False, LLMTaskMeta(model_name=settings.model)
        items = (
            ServiceItem(service, _context(service, rank, settings, handles.calls, ledger))
            for rank, service in itertools.takewhile(lambda _: not halted, enumerate(left))
        )
        async with pipeline.run(items, open_items=settings.concurrency) as outcomes:
            async for outcome in outcomes:
                service, context = outcome.item.service, outcome.item.context
                if isinstance(outcome.error, QueueHaltedError):
                    report.halted = str(outcome.error)  # what is in flight goes on to its end
                    halted = isinstance(outcome.error, OutOfQuotaError) or ledger.check(anybody) is not None
                    continue
                if outcome.error is None:
                    write_line(handles.records, make_record(service, outcome.unwrap()))
                    report.finished += 1
                else:
                    write_line(handles.quarantined, _quarantine_line(service, outcome.error))
                    report.quarantined += 1
                if context.transcript is not None:
                    context.transcript.write()
                report.seconds = time.monotonic() - started_at
                on_done(report)
    report.left = len(left) - report.finished - report.quarantined
    report.calls, report.calls_paid_twice = files.count_calls()
    report.seconds = time.monotonic() - started_at
    report.summary = ledger.summary(report.seconds)
    return report


def _context(service: Service, rank: int, settings: Settings, calls: IO[str], ledger: Ledger) -> SessionContext:
    def sending(stage: str) -> None:
        write_line(calls, {"service_id": service.service_id, "stage": stage})

    folder = settings.transcripts_dir
    return SessionContext(
        service.service_id,
        settings.model,
        rank=rank,
        models=settings.stage_models,
        cache=AnswerCache(settings.cache_mode, settings.cache_dir),
        transcript=None if folder is None else Transcript(folder, service.service_id),
        retry=settings.retry,
        request_timeout=settings.request_timeout,
        sending=sending,
        ledger=ledger,
    )


def _check_folders(settings: Settings) -> None:
    """Refuse a folder that cannot be written to before the first call is paid for."""
    folders = [settings.transcripts_dir]
    if settings.cache_mode in ("write", "refresh"):
        folders.append(settings.cache_dir)
    for folder in folders:
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    pass
        except OSError as error:
            raise ConfigError(f"cannot write to {folder}: {error.strerror or error}") from None


def _quarantine_line(service: Service, error: BaseException) -> dict[str, Any]:
    return {
        "service_id": service.service_id,
        "name": service.name,
        "error_type": type(error).__qualname__,
        "reason": describe(error),
    }


class _Handles(NamedTuple):
    done: set[str]
    records: IO[str]
    quarantined: IO[str]
    calls: IO[str]


class _Files:
    """OUT and the two files beside it."""

    def __init__(self, out: Path, field: str) -> None:
        self.out = out
        self._field = field
        self.quarantine = Path(f"{out}.quarantine.jsonl")
        self.calls = Path(f"{out}.calls.jsonl")

    @contextlib.contextmanager
    def opened(self, ids: set[str], *, resume: bool) -> Iterator[_Handles]:
        """The files, made fit to append to, and kept from a second run for the length of the block."""
        there = [path for path in (self.out, self.quarantine, self.calls) if path.exists()]
        if there and not resume:
            raise InputError(f"{there[0]} is there already; go on with --resume, or choose another --out")
        with contextlib.ExitStack() as stack:
            try:
                self.out.parent.mkdir(parents=True, exist_ok=True)
                records = stack.enter_context(self.out.open("a", encoding="utf-8"))
                _lock(records, self.out)
                done = self._done()
                for path in there:
                    drop_torn_line(path, _LINE_START)
                if self.quarantine in there:
                    self._forget_quarantined(ids | done)
                quarantined = stack.enter_context(self.quarantine.open("a", encoding="utf-8"))
                calls = stack.enter_context(self.calls.open("a", encoding="utf-8"))
            except OSError as error:
                raise InputError(f"cannot write to {self.out}: {error.strerror or error}") from None
            yield _Handles(done, records, quarantined, calls)

    @contextlib.contextmanager
    def reporting(self, ledger: Ledger, started_at: float) -> Iterator[None]:
        """Write what a run used, however it ends."""
        try:
            yield
        finally:
            summary = ledger.summary(time.monotonic() - started_at)
            with contextlib.suppress(OSError):  # of a full disk the records tell
                Path(f"{self.out}.report.json").write_text(summary.to_json() + "\n", encoding="utf-8")
                Path(f"{self.out}.report.html").write_text(summary.to_html(), encoding="utf-8")
            try:
                ledger.close()
            except InputError as error:  # the day's totals are behind; the run is not lost for it
                tell(logging.ERROR, "ledger", "%s", error)

    def _done(self) -> set[str]:
        """The services whose record is written."""
        done: set[str] = set()
        for number, record in read_lines(self.out, whole=True):
            service_id = record.get("service_id")
            if not isinstance(service_id, str) or service_id in done or self._field not in record:
                raise InputError(
                    f"{self.out}, line {number}: not a record of {self._field} (service_id {service_id!r}); choose "
                    "another --out"
                )
            done.add(service_id)
        return done

    def count_calls(self) -> tuple[int, int]:
        """Calls sent, and how many of them for the same service and stage as an earlier one."""
        sent = [(line.get("service_id"), line.get("stage")) for _, line in read_lines(self.calls)]
        return len(sent), len(sent) - len(set(sent))

    def _forget_quarantined(self, ids: set[str]) -> None:
        """Leave out the services that this run tries again, or has finished."""
        kept = [line for _, line in read_lines(self.quarantine) if line.get("service_id") not in ids]
        temporary = Path(f"{self.quarantine}.tmp")
        temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self.quarantine)


def _lock(file: IO[str], path: Path) -> None:
    """Refuse a second run on the same file, where the system has such locks."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"another run writes to {path}") from None
