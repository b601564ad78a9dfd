"""What happens in a queue, as it happens, for whoever wants to watch."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
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

    # No lock: a finaliser may tell of a change in the middle of anything. The writer appends and then looks for the
    # reader; the reader shows itself and then looks for what was appended.

    def __init__(self, size: int, on_close: Callable[[Changes], None]) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self._unread: deque[tuple[int, Change]] = deque(maxlen=size)
        self._numbers = itertools.count(1)
        self._read = 0
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
        self.end()

    def end(self) -> None:
        """Nothing more comes."""
        self._ended = True
        self._wake()

    def add(self, change: Change) -> None:
        """Take note; from anywhere."""
        self._unread.append((next(self._numbers), change))
        self._wake()

    def _wake(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            with suppress(Gone):
                reader.wake()

    def __aiter__(self) -> Changes:
        return self

    async def __anext__(self) -> Change:
        await anyio.lowlevel.checkpoint()
        while not self._unread:
            if self._ended:
                raise StopAsyncIteration
            if self._reader is not None:
                raise RuntimeError("one reader at a time; ask queue.changes() for another")
            self._reader = waiter = new_waiter()
            try:
                if not self._unread and not self._ended:
                    await waiter
            finally:
                if self._reader is waiter:
                    self._reader = None
        number, change = self._unread.popleft()
        missed, self._read = max(0, number - self._read - 1), number
        return replace(change, missed=missed) if missed else change
