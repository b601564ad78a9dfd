"""`run`: what `asyncio.run` is in a script, for a cell without `await`.

The kernel's own loop stands still while such a cell runs, so the work runs on a loop in a thread, one for all calls
since the connections of a client belong to a loop. This thread waits, and is the one that Interrupt reaches: it then
cancels all that the work has started, waits until that has ended, and only then lets the interrupt go on.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import signal
import threading
from asyncio import AbstractEventLoop
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import TypeVar

from llmq.started import Started, follow
from llmq.waiters import running_loop

T = TypeVar("T")

_guard = threading.Lock()
_thread: threading.Thread | None = None
_loop: AbstractEventLoop | None = None


def run(work: Awaitable[T] | Callable[[], Awaitable[T]]) -> T:
    """Run a coroutine, or an async function without arguments, from a cell without `await`; its result.

    Blocks. Interrupt cancels it and all tasks it has started, waits until they have ended, and raises
    KeyboardInterrupt; a second one does not wait. As with `asyncio.run`, tasks that it leaves behind are cancelled.
    All calls share one loop in a thread, so a client may be kept from one to the next; one that was used with
    top-level `await` before belongs to the kernel's loop, so make another. asyncio only.

    Raises what the work raises, RuntimeError within work that `run` runs (use `await` there), and TypeError for what is
    neither.
    """
    if not callable(work) and not inspect.isawaitable(work):
        raise TypeError(
            f"run() needs a coroutine, as in run(main()), or an async function, as in run(main); got {work!r}"
        )
    loop = _background_loop()
    if running_loop() is loop:
        if inspect.iscoroutine(work):
            work.close()
        raise RuntimeError("this is within llmq.notebook.run() already; use `await` here")
    started = Started()
    context = contextvars.copy_context()
    context.run(started.begin)
    running: Future[T] | None = None
    with _interruptible():
        try:
            running = context.run(asyncio.run_coroutine_threadsafe, _all_of(work, started), loop)
            return running.result()
        except KeyboardInterrupt:
            loop.call_soon_threadsafe(started.cancel)
            if running is not None:
                wait([running])
            raise


async def _all_of(work: Awaitable[T] | Callable[[], Awaitable[T]], started: Started) -> T:
    try:
        return await (work() if callable(work) else work)
    finally:
        await started.end()


def _background_loop() -> AbstractEventLoop:
    global _thread, _loop
    with _guard:
        if _loop is None or _thread is None or not _thread.is_alive():  # a forked process has the loop without it
            _loop = asyncio.new_event_loop()
            follow(_loop)
            _thread = threading.Thread(target=_loop.run_forever, name="llmq-notebook-run", daemon=True)
            _thread.start()
        return _loop


@contextmanager
def _interruptible() -> Iterator[None]:
    """In a thread whose loop runs, SIGINT may go to that loop, which cannot see it while this thread waits."""
    if running_loop() is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
