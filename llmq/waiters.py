"""How a waiting caller is parked and woken, in an asyncio loop, a trio run or a plain thread; and what time it is.

`wake` may be called from any thread and any loop, once. It raises `Gone` when the caller's loop has ended, so
that what was meant for it can go to somebody else. Who parks in a loop is woken through that loop: one
thread-safe call a waiter, no polling. In the thread of that loop the call need not be a thread-safe one.

`now()` is the time that the queue goes by: the monotonic clock, until somebody runs a loop with a clock of its own
(virtual time); from then on it asks the running loop, which costs more.
"""

from __future__ import annotations

import asyncio
import math
import sys
import threading
import time
from asyncio import AbstractEventLoop
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, Protocol

import anyio

if TYPE_CHECKING:
    from trio.abc import Clock
    from trio.lowlevel import TrioToken


class Gone(Exception):
    """The loop of the caller to be woken has ended."""


class Waiter(Protocol):
    """A parked caller."""

    def wake(self) -> None:
        """Let the caller go on; safe from anywhere. Raises `Gone`."""

    @property
    def home(self) -> object:
        """The loop or run in which it waits; None for a thread."""


class AsyncWaiter(Waiter, Protocol):
    """A parked task. To await it is to wait without a bound."""

    def __await__(self) -> Generator[Any, None, bool]:
        """Return True after `wake`."""

    async def wait(self, timeout: float | None = None) -> bool:
        """Return after `wake`; False when `timeout` seconds passed first."""


class AsyncioWaiter(asyncio.Future[bool]):
    """A task of an asyncio loop. It is its own future, since there may be 100,000 of them."""

    __slots__ = ("_thread",)

    def __init__(self, loop: AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self._thread = threading.get_ident()

    async def wait(self, timeout: float | None = None) -> bool:
        """Return after `wake`; False when `timeout` seconds passed first."""
        if timeout is None:
            return await self
        # No cancel scope: a task that is collected here could not leave it.
        timer = self.get_loop().call_later(timeout, self._resolve, False)
        try:
            return await self
        finally:
            timer.cancel()

    def wake(self) -> None:
        """Let the task go on."""
        try:
            if threading.get_ident() == self._thread:
                self._resolve(True)
            else:
                self.get_loop().call_soon_threadsafe(self._resolve, True)
        except RuntimeError as error:  # the loop is closed
            raise Gone from error

    @property
    def home(self) -> object:
        """Its loop."""
        return self.get_loop()

    def _resolve(self, woken: bool) -> None:
        if not self.done():
            self.set_result(woken)


class TrioWaiter:
    """A task of a trio run."""

    __slots__ = ("_event", "_token")

    def __init__(self) -> None:
        import trio

        self._token: TrioToken = trio.lowlevel.current_trio_token()
        self._event = trio.Event()

    async def wait(self, timeout: float | None = None) -> bool:
        """Return after `wake`; False when `timeout` seconds passed first."""
        import trio

        with trio.move_on_after(math.inf if timeout is None else timeout):
            await self._event.wait()
        return self._event.is_set()

    def __await__(self) -> Generator[Any, None, bool]:
        """Return True after `wake`."""
        return self.wait().__await__()

    @property
    def home(self) -> object:
        """Its run."""
        return self._token

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

    @property
    def home(self) -> None:
        """None."""

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
        notice_clock()
        return TrioWaiter()
    loop = running_loop()
    if loop is None:
        raise RuntimeError("no asyncio or trio event loop runs here; from a plain thread use submit_sync()")
    if type(loop).time is not _REAL_TIME:
        use_loop_clocks()
    return AsyncioWaiter(loop)


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
    virtual = _mock_clock()
    return time.monotonic() if virtual is None else float(virtual.current_time())


now: Callable[[], float] = time.monotonic
"""Seconds, as cheaply as possible. To be called as `waiters.now()`, since it may be replaced by `clock`."""

_REAL_TIME = asyncio.BaseEventLoop.time


def use_loop_clocks() -> None:
    """Go by the clock of the running loop from now on."""
    global now
    now = clock


def notice_clock() -> None:
    """Go by the clock of the running loop if that is another than the monotonic one."""
    loop = running_loop()
    if (loop is not None and type(loop).time is not _REAL_TIME) or _mock_clock() is not None:
        use_loop_clocks()


def _mock_clock() -> Clock | None:
    """The clock of the trio run in this thread, if that is a mock."""
    testing = sys.modules.get("trio.testing")
    if testing is None or not in_trio_run():
        return None
    found: Clock = sys.modules["trio"].lowlevel.current_clock()
    return found if isinstance(found, testing.MockClock) else None
