"""How a waiting caller is parked and woken: in an asyncio loop, a trio run or a plain thread.

`wake` may be called from any thread and any loop, once. It raises `Gone` when the caller's loop has ended, so
that what was meant for it can go to somebody else. Who parks in a loop is woken through that loop: one
thread-safe call a waiter, no polling.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from asyncio import AbstractEventLoop
from typing import TYPE_CHECKING, Protocol

import anyio

if TYPE_CHECKING:
    from trio.lowlevel import TrioToken


class Gone(Exception):
    """The loop of the caller to be woken has ended."""


class Waiter(Protocol):
    """A parked caller."""

    def wake(self) -> None:
        """Let the caller go on; safe from anywhere. Raises `Gone`."""


class AsyncWaiter(Waiter, Protocol):
    """A parked task."""

    async def wait(self) -> None:
        """Return after `wake`."""


class AsyncioWaiter:
    """A task of an asyncio loop."""

    __slots__ = ("_future", "_loop")

    def __init__(self, loop: AbstractEventLoop) -> None:
        self._loop = loop
        self._future: asyncio.Future[None] = loop.create_future()

    async def wait(self) -> None:
        """Return after `wake`."""
        await self._future

    def wake(self) -> None:
        """Let the task go on."""
        if running_loop() is self._loop:
            self._resolve()
            return
        try:
            self._loop.call_soon_threadsafe(self._resolve)
        except RuntimeError as error:
            raise Gone from error

    def _resolve(self) -> None:
        if not self._future.done():
            self._future.set_result(None)


class TrioWaiter:
    """A task of a trio run."""

    __slots__ = ("_event", "_token")

    def __init__(self) -> None:
        import trio

        self._token: TrioToken = trio.lowlevel.current_trio_token()
        self._event = trio.Event()

    async def wait(self) -> None:
        """Return after `wake`."""
        await self._event.wait()

    def wake(self) -> None:
        """Let the task go on."""
        import trio

        if in_trio_run() and trio.lowlevel.current_trio_token() is self._token:
            self._event.set()
            return
        try:
            self._token.run_sync_soon(self._event.set, idempotent=True)
        except trio.RunFinishedError as error:
            raise Gone from error


class ThreadWaiter:
    """A blocked thread.

    On a bare lock, which takes no other: a garbage collection inside the wait may be what wakes it.
    """

    __slots__ = ("_closed",)

    def __init__(self) -> None:
        self._closed = threading.Lock()
        self._closed.acquire()

    def wait_blocking(self, timeout: float | None) -> bool:
        """Block until `wake`; False when `timeout` seconds passed first."""
        return self._closed.acquire(timeout=-1 if timeout is None else timeout)

    def wake(self) -> None:
        """Let the thread go on."""
        self._closed.release()


def running_loop() -> AbstractEventLoop | None:
    """The asyncio loop that runs in this thread, or None."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def in_trio_run() -> bool:
    """Whether this thread is inside a trio run. Never imports trio."""
    trio = sys.modules.get("trio")
    return trio is not None and bool(trio.lowlevel.in_trio_run())


def new_waiter() -> AsyncWaiter:
    """Park-place for the current task. Raises RuntimeError outside asyncio and trio."""
    if in_trio_run():  # first, since trio may run as a guest of an asyncio loop
        return TrioWaiter()
    loop = running_loop()
    if loop is not None:
        return AsyncioWaiter(loop)
    raise RuntimeError("no asyncio or trio event loop runs here; from a plain thread use submit_sync()")


def is_own_cancellation(error: BaseException) -> bool:
    """Whether `error` is the current task being told to stop.

    On asyncio a task can also see a CancelledError that is not its own: that of something it awaited.
    """
    if not isinstance(error, anyio.get_cancelled_exc_class()):
        return False
    if in_trio_run():
        return True
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


def clock() -> float:
    """Seconds on the caller's clock: the monotonic one, or its loop's where that is virtual.

    asyncio loops and trio runs in real time share it with plain threads.
    """
    loop = running_loop()
    if loop is not None:
        return loop.time()
    testing = sys.modules.get("trio.testing")
    if testing is not None and in_trio_run():
        virtual = sys.modules["trio"].lowlevel.current_clock()
        if isinstance(virtual, testing.MockClock):
            return float(virtual.current_time())
    return time.monotonic()
