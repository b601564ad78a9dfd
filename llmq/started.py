"""Which tasks a piece of work has started, itself or through others: by a context variable, which tasks inherit."""

from __future__ import annotations

import asyncio
import contextvars
import weakref
from asyncio import AbstractEventLoop
from typing import Any

_work: contextvars.ContextVar[Started | None] = contextvars.ContextVar("llmq_started", default=None)


class Started:
    """The tasks that one piece of work has started, in loops that are followed."""

    def __init__(self) -> None:
        self._tasks: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()

    def begin(self) -> None:
        """Count what is started from here on, in this context and in those copied from it."""
        _work.set(self)

    def cancel(self) -> None:
        """Cancel what still runs. In the thread of their loop."""
        for task in self._open():
            task.cancel()

    async def end(self) -> None:
        """Cancel all but the caller's own task, and wait until they have ended."""
        rest = [task for task in self._open() if task is not asyncio.current_task()]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    def _open(self) -> list[asyncio.Task[Any]]:
        return [task for task in list(self._tasks) if not task.done()]


def follow(loop: AbstractEventLoop) -> None:
    """Have the tasks of this loop counted; beside the task factory that it has."""
    make = loop.get_task_factory()

    def start(loop: AbstractEventLoop, coro: Any, **options: Any) -> Any:
        task = asyncio.Task(coro, loop=loop, **options) if make is None else make(loop, coro, **options)
        context = options.get("context")
        started = _work.get() if context is None else context.get(_work)
        if started is not None and isinstance(task, asyncio.Task):
            started._tasks.add(task)
        return task

    loop.set_task_factory(start)
