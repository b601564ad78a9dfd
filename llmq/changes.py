"""What happens in a queue, as it happens, for whoever wants to watch."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import anyio
import anyio.lowlevel

from llmq.waiters import AsyncWaiter, Gone, new_waiter

if TYPE_CHECKING:
    from types import TracebackType

ChangeKind = Literal[
    "waiting",
    "started",
    "ended",
    "dropped",
    "resized",
    "reconfigured",
    "paused",
    "resumed",
    "held",
    "draining",
    "closed",
]


@dataclass(frozen=True, slots=True)
class Change:
    """One change of state: what, when, which call (None where it is of the whole queue), and the counts after it.

    `at` is in seconds on the queue's clock. `sequence` numbers attempts in order of arrival. `missed` counts the
    changes that were lost before this one because the reader was slow.
    """

    kind: ChangeKind
    at: float
    in_flight: int
    waiting: int
    limit: int
    sequence: int | None = None
    stage: str | None = None
    model_name: str | None = None
    service_id: str | None = None
    request_id: str | None = None
    missed: int = 0


class Changes:
    """The changes from now on: `async for change in queue.changes()`, best within `with`, which ends the watching.

    Keeps the newest `size` that were not read yet, so a slow reader loses the oldest and holds nobody up. For one
    reader. Ends when the queue is closed.
    """

    def __init__(self, size: int, on_close: Callable[[Changes], None]) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self._unread: deque[Change] = deque()
        self._size = size
        self._missed = 0
        self._lock = threading.Lock()
        self._reader: AsyncWaiter | None = None
        self._on_close = on_close
        self._ended = False

    def __enter__(self) -> Changes:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Watch no longer. What was not read can still be."""
        self._on_close(self)
        self._ended = True
        self._wake()

    def add(self, change: Change) -> None:
        """Take note; from any thread."""
        with self._lock:
            if len(self._unread) >= self._size:
                self._unread.popleft()
                self._missed += 1
            self._unread.append(change)
        self._wake()

    def _wake(self) -> None:
        with self._lock:
            reader, self._reader = self._reader, None
        if reader is not None:
            try:
                reader.wake()
            except Gone:
                self._on_close(self)

    def __aiter__(self) -> Changes:
        return self

    async def __anext__(self) -> Change:
        while True:
            with self._lock:
                if self._unread:
                    change = self._unread.popleft()
                    missed, self._missed = self._missed, 0
                    break
                if self._ended:
                    raise StopAsyncIteration
                if self._reader is not None:
                    raise RuntimeError("one reader at a time; ask queue.changes() for another")
                self._reader = waiter = new_waiter()
            try:
                await waiter.wait()
            finally:
                with self._lock:
                    if self._reader is waiter:
                        self._reader = None
        await anyio.lowlevel.checkpoint()
        if not missed:
            return change
        return Change(**{name: getattr(change, name) for name in Change.__slots__ if name != "missed"}, missed=missed)
