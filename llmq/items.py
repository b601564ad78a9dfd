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
import functools
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar, cast

import anyio
from anyio.abc import TaskGroup

from llmq.progress import Progress
from llmq.waiters import in_trio_run, is_own_cancellation

T = TypeVar("T")
R = TypeVar("R")


@dataclass(slots=True)
class ItemOutcome(Generic[T, R]):
    """What came of one item: `result`, or `error` where it is not None. `index` counts from 0.

    `error` is an Exception, or the CancelledError of something that the call itself awaited.
    """

    index: int
    item: T
    result: R | None = None
    error: BaseException | None = None

    def unwrap(self) -> R:
        """The result; raises the error instead if there is one."""
        if self.error is not None:
            raise self.error
        return cast("R", self.result)


class ItemRun(Generic[T, R]):
    """`run_one(index, item)` over `items`, at most `window()` at once. Made by the queue, iterated once.

    `progress` is shown from the first item until the run has ended, however it ends.
    """

    def __init__(
        self,
        run_one: Callable[[int, T], Awaitable[R]],
        items: Iterable[T] | AsyncIterable[T],
        window: Callable[[], int],
        *,
        ordered: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self._state = _State(run_one, items, window, ordered, progress)
        self._tasks: set[asyncio.Task[None]] = set()
        self._nursery: TaskGroup | None = None

    def grow(self) -> None:
        """Use a window that has grown. Also noticed by itself whenever an item is done."""
        self._state.fill()

    async def __aenter__(self) -> AsyncIterator[ItemOutcome[T, R]]:
        self._state.claim()
        if in_trio_run():
            self._nursery = anyio.create_task_group()
            await self._nursery.__aenter__()
            nursery = self._nursery
            self._state.start(lambda: nursery.start_soon(self._state.work))
        else:
            # Plain tasks and no task group, whose cancel scope would reach into a consumer's generator.
            self._state.start(functools.partial(_spawn, self._state, self._tasks))
        return self._state

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._state.closing = True
        try:
            await self._end_workers(exc_type, exc, traceback)
        finally:
            self._state.show_end()

    async def _end_workers(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._nursery is None:
            await _stop(self._tasks)
            return
        self._nursery.cancel_scope.cancel()
        try:
            await self._nursery.__aexit__(exc_type, exc, traceback)
        except BaseExceptionGroup:
            if self._state.failure is not None:
                raise self._state.failure from None
            # else it is the body's own exception, wrapped: that goes on as it is

    async def __aiter__(self) -> AsyncIterator[ItemOutcome[T, R]]:
        if in_trio_run():
            raise RuntimeError("plain `async for` needs asyncio; here use `async with ... as outcomes:` around it")
        # Nothing here refers to self, so that a run that nobody iterates any more is collected.
        state, tasks = self._state, self._tasks
        state.claim()
        state.start(functools.partial(_spawn, state, tasks))
        try:
            async for outcome in state:
                yield outcome
        finally:
            state.closing = True
            try:
                await _stop(tasks)
            finally:
                state.show_end()


def _spawn(state: _State[Any, Any], tasks: set[asyncio.Task[None]]) -> None:
    task = asyncio.create_task(state.work())
    tasks.add(task)
    task.add_done_callback(tasks.discard)


async def _stop(tasks: set[asyncio.Task[None]]) -> None:
    """Cancel, and wait until the calls have really ended."""
    running = list(tasks)
    for task in running:
        task.cancel()
    with anyio.CancelScope(shield=True):
        await asyncio.gather(*running, return_exceptions=True)


class _State(Generic[T, R]):
    """What the workers and the reader share."""

    def __init__(
        self,
        run_one: Callable[[int, T], Awaitable[R]],
        items: Iterable[T] | AsyncIterable[T],
        window: Callable[[], int],
        ordered: bool,
        progress: Progress | None,
    ) -> None:
        self._run_one = run_one
        self._source: Any = aiter(items) if isinstance(items, AsyncIterable) else iter(items)
        self._async_source = isinstance(items, AsyncIterable)
        self._pulling = anyio.Lock()
        self._window = window
        self._ordered = ordered
        self._progress = progress
        self._complete = False
        self._claimed = False
        self._spawn: Callable[[], object] = lambda: None
        self._workers = 0
        self._exhausted = False
        self.failure: BaseException | None = None
        self._pulled = 0
        self._handed = 0
        self._done: dict[int, ItemOutcome[T, R]] = {}
        self._changed = anyio.Event()
        self._room = anyio.Event()
        self.closing = False

    def claim(self) -> None:
        """Refuse a second iteration."""
        if self._claimed:
            raise RuntimeError("these outcomes are read already; call map() or run() again for a new pass")
        self._claimed = True
        if self._progress is not None:
            self._progress.start()

    def show_end(self) -> None:
        """The last state of the progress, if it is shown."""
        if self._progress is not None:
            self._progress.stop(complete=self._complete)

    def start(self, spawn: Callable[[], object]) -> None:
        """Start the first workers."""
        self._spawn = spawn
        self.fill()

    def fill(self) -> None:
        """Have as many workers as the window allows."""
        while not self._exhausted and not self.closing and self._workers < max(1, self._window()):
            self._workers += 1
            self._spawn()

    async def work(self) -> None:
        """One worker: pull an item, run it, hand its outcome over, until there is none or too many work."""
        try:
            while not self._exhausted and not self.closing and self._workers <= max(1, self._window()):
                if self._pulled - self._handed >= 2 * max(1, self._window()):
                    self._room = anyio.Event() if self._room.is_set() else self._room
                    await self._room.wait()
                    continue
                pulled = await self._pull()
                if pulled is None:
                    return
                self._done[pulled[0]] = await self._run(*pulled)
                self._changed.set()
                self.fill()
        except BaseException as error:
            if not self.closing and not is_own_cancellation(error):
                self._fail(error)
            if not isinstance(error, Exception):
                raise
        finally:
            self._workers -= 1
            self._changed.set()

    async def _run(self, index: int, item: T) -> ItemOutcome[T, R]:
        try:
            return ItemOutcome[T, R](index, item, await self._run_one(index, item))
        except Exception as error:
            return ItemOutcome[T, R](index, item, error=error)
        except asyncio.CancelledError as error:
            # That of something the call awaited is the item's failure; one that was meant for us is obeyed.
            if self.closing or is_own_cancellation(error):
                raise
            return ItemOutcome[T, R](index, item, error=error)

    def _fail(self, error: BaseException) -> None:
        """End the run: the reader gets what is done, then the error."""
        self._exhausted = True
        self.failure = self.failure or error

    def __aiter__(self) -> _State[T, R]:
        return self

    async def __anext__(self) -> ItemOutcome[T, R]:
        """What is done, as it gets done, or in the order of the items."""
        self.fill()
        while (outcome := self._take()) is None:
            if self._exhausted and (self._workers == 0 or self._broken()):
                if self.failure is not None:
                    raise self.failure
                self._complete = True
                raise StopAsyncIteration
            self._changed = anyio.Event() if self._changed.is_set() else self._changed
            await self._changed.wait()
        self._handed += 1
        self._room.set()
        return outcome

    def _broken(self) -> bool:
        """Whether a worker ended by something that is no ordinary error: nothing more is waited for."""
        return self.failure is not None and not isinstance(self.failure, Exception)

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
            self._fail(error)
        return None

    def _counted(self, item: T) -> tuple[int, T]:
        index = self._pulled
        self._pulled += 1
        return index, item
