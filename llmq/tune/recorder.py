"""A run recorded as a trace, with the queue or without: what `llmq what-if` starts from."""

from __future__ import annotations

from collections import deque
from pathlib import Path

from llmq.errors import ConfigError
from llmq.ledger import BudgetEvent, Ledger
from llmq.queue import MAX_RECORDS
from llmq.records import AttemptRecord
from llmq.runtime import active_queue
from llmq.settings import Settings
from llmq.tune.trace import Trace, most_at_once


class RecordingLedger(Ledger):
    """Of the settings; also keeps the newest attempts."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.prices, settings.budgets, path=settings.llm_budget_ledger)
        self.attempts: deque[AttemptRecord] = deque(maxlen=MAX_RECORDS)

    def add_attempt(self, record: AttemptRecord) -> tuple[BudgetEvent, ...]:
        """Keep it, and count it."""
        self.attempts.append(record)
        return super().add_attempt(record)


class RunRecorder:
    """Writes what a run did to a new file. `ledger` is for a run without the queue; None with it, which keeps records.

    Raises `ConfigError` for a file that is there already or cannot be, or that `out`, the run's records, or a file
    beside it is going to be.
    """

    def __init__(self, path: Path, settings: Settings, out: Path) -> None:
        if path.exists():
            raise ConfigError(f"{path} is there already; choose another file for --trace")
        if not path.parent.is_dir():
            raise ConfigError(f"--trace cannot be written: there is no folder {path.parent}")
        place, records = path.resolve(), out.resolve()
        if place.parent == records.parent and (place.name + ".").casefold().startswith(f"{records.name}.".casefold()):
            raise ConfigError(f"{path} is, or may be, what the run itself writes ({out}, {out}.*); choose another file")
        self._path = path
        self.ledger = None if settings.llm_queue_enabled else RecordingLedger(settings)

    def write(self) -> None:
        """Write what is recorded so far; nothing where that is nothing. Raises `ConfigError`.

        Without a queue the level is the most that ran at once.
        """
        queue = active_queue()
        if self.ledger is not None:
            attempts, note = list(self.ledger.attempts), "without the queue"
            level = max(1, most_at_once(attempts))
        elif queue is not None:
            attempts, note = list(queue.records().attempts), ""
            level = max(queue.max_concurrency, most_at_once(attempts))
        else:
            return
        if attempts:
            Trace.from_records(attempts, level, note).write(self._path, replace=False)
