"""A virtual clock for asyncio: time jumps to the next timer as soon as nothing else is left to do.

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())          # an hour of asyncio.sleep takes a moment

Only what waits by the loop's own timers is virtual. Sockets, threads and processes run in real time and are
not waited for. trio has its own virtual clock, `trio.testing.MockClock(autojump_threshold=0)`.
"""

import asyncio
import selectors
from collections.abc import Mapping
from typing import Any

from llmq.waiters import use_loop_clocks


class VirtualDeadlock(RuntimeError):
    """Every task waits for another one and no timer is set: in real time this would hang for ever."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """An asyncio event loop whose `time()` starts at 0 and moves only when every task waits."""

    def __init__(self) -> None:
        self._virtual_seconds = 0.0
        super().__init__(_JumpingSelector(self))
        use_loop_clocks()

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._virtual_seconds

    def jump(self, seconds: float) -> None:
        """Move the clock on."""
        self._virtual_seconds += seconds


class _JumpingSelector(selectors.BaseSelector):
    """Polls the real selector without waiting; where it would wait, the loop's clock jumps instead."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._real = selectors.DefaultSelector()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = self._real.select(0)
        if ready or (timeout is not None and timeout <= 0):
            return ready
        if timeout is None:
            raise VirtualDeadlock(f"nothing is left to run or to wait for at virtual {self._loop.time():.6f} s")
        self._loop.jump(timeout)
        return []

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.modify(fileobj, events, data)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._real.get_map()

    def close(self) -> None:
        self._real.close()
