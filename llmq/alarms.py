"""The queue's timer: one for each loop in which callers wait, so that any loop may end without taking the time along.

In the usual case that is one. An alarm that rings too early, or in vain, does no harm: whoever hears it asks the
scheduler again.
"""

from __future__ import annotations

import math
import threading
import weakref
from asyncio import AbstractEventLoop, TimerHandle
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from llmq import waiters
from llmq.waiters import Gone, in_trio_run, running_loop

if TYPE_CHECKING:
    from trio import CancelScope
    from trio.lowlevel import TrioToken

Ring = Callable[["Alarm", float], None]
"""Called with the alarm and the time that it was set to."""


class Alarm(Protocol):
    """Rings once at `at`, in its loop, after `start`. `at` is infinite where it is not set."""

    at: float

    def is_in(self, home: object) -> bool:
        """Whether it rings there."""

    def is_gone(self) -> bool:
        """Whether its loop has ended."""

    def start(self) -> None:
        """See to it that it rings at `at`; safe from anywhere. Raises `Gone` when its loop has ended."""


class AsyncioAlarm:
    """In an asyncio loop."""

    def __init__(self, loop: AbstractEventLoop, ring: Ring) -> None:
        self.at = math.inf
        self._loop = weakref.ref(loop)
        self._thread = threading.get_ident()
        self._ring = ring
        self._handle: TimerHandle | None = None

    def is_in(self, home: object) -> bool:
        """Whether that is its loop."""
        return self._loop() is home

    def is_gone(self) -> bool:
        """Whether its loop has ended."""
        loop = self._loop()
        return loop is None or loop.is_closed()

    def start(self) -> None:
        """Arm the loop's timer."""
        loop = self._loop()
        if loop is None or loop.is_closed():
            raise Gone
        if threading.get_ident() == self._thread:
            self._arm()
            return
        try:
            loop.call_soon_threadsafe(self._arm)
        except RuntimeError as error:
            raise Gone from error

    def _arm(self) -> None:
        loop = self._loop()
        if loop is None or self.at == math.inf:
            return
        if self._handle is not None:
            self._handle.cancel()
        self._handle = loop.call_later(max(0.0, self.at - waiters.now()), self._fire, self.at)

    def _fire(self, at: float) -> None:
        self._handle = None
        self._ring(self, at)


class TrioAlarm:
    """In a trio run."""

    def __init__(self, ring: Ring) -> None:
        import trio

        self.at = math.inf
        self._token: TrioToken = trio.lowlevel.current_trio_token()
        self._ring = ring
        self._scope: CancelScope | None = None
        self._ended = False

    def is_in(self, home: object) -> bool:
        """Whether that is its run."""
        return self._token is home

    def is_gone(self) -> bool:
        """Whether its run has ended."""
        import trio

        try:
            self._token.run_sync_soon(_nothing, idempotent=True)
        except trio.RunFinishedError:
            self._ended = True
        return self._ended

    def start(self) -> None:
        """Start a task of the run that sleeps until then."""
        import trio

        if in_trio_run() and trio.lowlevel.current_trio_token() is self._token:
            self._arm()
            return
        try:
            self._token.run_sync_soon(self._arm)
        except trio.RunFinishedError as error:
            self._ended = True
            raise Gone from error

    def _arm(self) -> None:
        import trio

        if self._scope is not None:
            self._scope.cancel()
        if self.at < math.inf:
            self._scope = trio.CancelScope()
            try:
                trio.lowlevel.spawn_system_task(self._sleep, self._scope, self.at)
            except RuntimeError:  # the run is about to end, and takes no more tasks
                self._ended = True

    async def _sleep(self, scope: CancelScope, at: float) -> None:
        import trio

        with scope:
            await trio.sleep(max(0.0, at - waiters.now()))
        if not scope.cancelled_caught:
            if self._scope is scope:
                self._scope = None
            self._ring(self, at)


def _nothing() -> None:
    """To see whether a run still takes something."""


class ThreadAlarm:
    """For plain threads."""

    def __init__(self, ring: Ring) -> None:
        self.at = math.inf
        self._ring = ring
        self._guard = threading.RLock()  # a finaliser may come back to it
        self._timer: threading.Timer | None = None
        self._timer_at = math.inf

    def is_in(self, home: object) -> bool:
        """Whether nobody's."""
        return home is None

    def is_gone(self) -> bool:
        """Never."""
        return False

    def start(self) -> None:
        """Start a thread that sleeps until then, unless one rings before."""
        with self._guard:
            at = self.at
            if at >= self._timer_at:
                return
            timer = threading.Timer(max(0.0, at - waiters.now()), self._fire, (at,))
            timer.daemon = True
            old, self._timer, self._timer_at = self._timer, timer, at
            if old is not None:
                old.cancel()
            timer.start()

    def _fire(self, at: float) -> None:
        with self._guard:
            if self._timer_at == at:
                self._timer, self._timer_at = None, math.inf
        self._ring(self, at)


def new_alarm(ring: Ring) -> Alarm:
    """For the loop, run or thread that runs this."""
    if in_trio_run():
        return TrioAlarm(ring)
    loop = running_loop()
    return ThreadAlarm(ring) if loop is None else AsyncioAlarm(loop, ring)
