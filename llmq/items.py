"""Run an async function over a stream of items, a bounded number of them at once, with an outcome each.

The common part of `LLMQueue.map` and `Pipeline.run`. Workers pull items as they become free, so the input may be
endless; what has been pulled and not yet handed out is at most twice the window, so a slow reader holds the
workers back. An error belongs to its item. There is no task per item.

    async with run as outcomes:             # asyncio and trio
        async for outcome in outcomes: ...

    async for outcome in run: ...           # asyncio only: workers end when the iterator is closed or collected
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar, cast

import anyio
from anyio.abc import TaskGroup

from llmq.waiters import running_loop

T = TypeVar("T")
R = TypeVar("R")


@dataclass(slots=True)
class ItemOutcome(Generic[T, R]):
    """What came of one item: `result`, or `error` where it is not None. `index` counts from 0."""

    index: int
    item: T
    result: R | None = None
    error: Exception | None = None

    def unwrap(self) -> R:
        """The result; raises the error instead if there is one."""
        if self.error is not None:
            raise self.error
        return cast("R", self.result)


class ItemRun(Generic[T, R]):
    """`run_one(index, item)` over `items`, at most `window()` at once. Made by the queue, iterated once."""

    def __init__(
        self,
        run_one: Callable[[int, T], Awaitable[R]],
        items: Iterable[T] | AsyncIterable[T],
        window: Callable[[], int],
        *,
        ordered: bool = False,
    ) -> None:
        self._state = _State(run_one, items, window, ordered)
        self._group: TaskGroup | None = None

    async def __aenter__(self) -> AsyncIterator[ItemOutcome[T, R]]:
        self._state.claim()
        self._group = anyio.create_task_group()
        await self._group.__aenter__()
        group = self._group
        self._state.start(lambda: group.start_soon(self._state.work))
        return self._state

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        group = self._group
        assert group is not None, "__aexit__ without __aenter__"
        group.cancel_scope.cancel()
        try:
            return await group.__aexit__(exc_type, exc, traceback)
        except BaseExceptionGroup as raised:
            if exc is not None and raised.exceptions == (exc,):
                return None  # the body's own exception, which anyio wraps: let it go on as it is
            raise

    async def __aiter__(self) -> AsyncIterator[ItemOutcome[T, R]]:
        if running_loop() is None:
            raise RuntimeError("plain `async for` needs asyncio; here use `async with ... as outcomes:` around it")
        self._state.claim()
        tasks: set[asyncio.Task[None]] = set()

        def spawn() -> None:
            task = asyncio.create_task(state.work())
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        state = self._state
        state.start(spawn)
        try:
            async for outcome in state:
                yield outcome
        finally:
            running = list(tasks)
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)


class _State(Generic[T, R]):
    """What the workers and the reader share."""

    def __init__(
        self,
        run_one: Callable[[int, T], Awaitable[R]],
        items: Iterable[T] | AsyncIterable[T],
        window: Callable[[], int],
        ordered: bool,
    ) -> None:
        self._run_one = run_one
        self._source: Any = aiter(items) if isinstance(items, AsyncIterable) else iter(items)
        self._async_source = isinstance(items, AsyncIterable)
        self._pulling = anyio.Lock()
        self._window = window
        self._ordered = ordered
        self._claimed = False
        self._spawn: Callable[[], object] = lambda: None
        self._workers = 0
        self._exhausted = False
        self._source_error: Exception | None = None
        self._pulled = 0
        self._handed = 0
        self._done: dict[int, ItemOutcome[T, R]] = {}
        self._changed = anyio.Event()
        self._room = anyio.Event()

    def claim(self) -> None:
        """Refuse a second iteration."""
        if self._claimed:
            raise RuntimeError("these outcomes are read already; call map() or run() again for a new pass")
        self._claimed = True

    def start(self, spawn: Callable[[], object]) -> None:
        """Start the first workers."""
        self._spawn = spawn
        self._fill()

    async def work(self) -> None:
        """One worker: pull an item, run it, hand its outcome over, until there is none or too many work."""
        try:
            while not self._exhausted and self._workers <= max(1, self._window()):
                if self._pulled - self._handed >= 2 * max(1, self._window()):
                    self._room = anyio.Event() if self._room.is_set() else self._room
                    await self._room.wait()
                    continue
                pulled = await self._pull()
                if pulled is None:
                    return
                index, item = pulled
                try:
                    outcome = ItemOutcome[T, R](index, item, await self._run_one(index, item))
                except Exception as error:
                    outcome = ItemOutcome[T, R](index, item, error=error)
                self._done[index] = outcome
                self._changed.set()
                self._fill()
        finally:
            self._workers -= 1
            self._changed.set()

    def __aiter__(self) -> _State[T, R]:
        return self

    async def __anext__(self) -> ItemOutcome[T, R]:
        """What is done, as it gets done, or in the order of the items."""
        while (outcome := self._take()) is None:
            if self._workers == 0 and self._exhausted and not self._done:
                if self._source_error is not None:
                    raise self._source_error
                raise StopAsyncIteration
            self._changed = anyio.Event()
            await self._changed.wait()
        self._handed += 1
        self._room.set()
        return outcome

    def _take(self) -> ItemOutcome[T, R] | None:
        if self._ordered:
            return self._done.pop(self._handed, None)
        if not self._done:
            return None
        return self._done.pop(next(iter(self._done)))

    async def _pull(self) -> tuple[int, T] | None:
        """The next item and its index. An error of the iterable ends the run after what was pulled before."""
        try:
            if self._async_source:
                async with self._pulling:
                    return None if self._exhausted else self._counted(await anext(self._source))
            return self._counted(next(self._source))
        except (StopIteration, StopAsyncIteration):
            self._exhausted = True
        except Exception as error:
            self._exhausted = True
            self._source_error = error
        return None

    def _counted(self, item: T) -> tuple[int, T]:
        index = self._pulled
        self._pulled += 1
        return index, item

    def _fill(self) -> None:
        while not self._exhausted and self._workers < max(1, self._window()):
            self._workers += 1
            self._spawn()
