"""Interrupt, in a kernel: it lands at once, and nothing that the cell has started goes on.

What ipykernel does, and what is missing
- In a cell with top-level `await`, SIGINT cancels the task of the cell, and so whatever that awaits. The handler asks
  for it by the loop's `call_soon`, which does not wake a loop that sleeps: an idle one hears of it when something
  else happens, however late (ipykernel issue 881). So signals are written to a socket that the loop reads
  (`signal.set_wakeup_fd`), which costs nothing in between, unlike a heartbeat.
- Tasks that the cell has started but does not await go on, also under `asyncio.wait`, and so would their paid calls.
  So tasks are counted to the cell that has started them, itself or through others, and cancelled when it was
  interrupted. What earlier cells have started goes on: it was meant to.
- In a cell without `await` SIGINT raises KeyboardInterrupt; `llmq.notebook.run` cancels its work then.

A byte in the socket is of the cell that runs, since the kernel ignores SIGINT between cells. It is read when the cell
ends, too: one without `await` does not let the loop run. Where somebody else has signals written elsewhere, that is
left alone, and then nothing is cancelled here.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import threading
from asyncio import AbstractEventLoop
from typing import Any

from llmq.started import Started, follow
from llmq.waiters import running_loop

_BYTES = 4096
_minded: _Cells | None = None


def mind_interrupts() -> None:
    """In a cell of a kernel: as above, from now on. Elsewhere, and the second time, nothing."""
    global _minded
    if "ipykernel" not in sys.modules or _minded is not None:
        return
    if threading.current_thread() is threading.main_thread():
        shell, loop = _shell(), running_loop()
        if loop is not None and loop is _kernel_loop(shell):
            _minded = _Cells(shell, loop)


def _shell() -> Any:
    from IPython.core.getipython import get_ipython

    return get_ipython()


def _kernel_loop(shell: Any) -> object:
    """The loop in which the shell runs its cells; None if it is no kernel's, or not on asyncio."""
    return getattr(getattr(getattr(shell, "kernel", None), "io_loop", None), "asyncio_loop", None)


class _Cells:
    """The cell that runs: what it has started, and whether it was interrupted."""

    def __init__(self, shell: Any, loop: AbstractEventLoop) -> None:
        self._signals, self._heard = socket.socketpair()
        self._signals.setblocking(False)
        self._heard.setblocking(False)
        follow(loop)
        self._begin()
        with contextlib.suppress(NotImplementedError):  # a loop that wakes for signals by itself
            loop.add_reader(self._heard, self._hear)
            _write_signals_to(self._signals)
        shell.events.register("pre_run_cell", self._begin)
        shell.events.register("post_run_cell", self._end)

    def _begin(self, _: object = None) -> None:
        self._hear()
        self._interrupted = False
        self._started = Started()
        self._started.begin()

    def _hear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while signals := self._heard.recv(_BYTES):
                self._interrupted = self._interrupted or signal.SIGINT in signals

    def _end(self, _: object) -> None:
        self._hear()
        if self._interrupted:
            self._started.cancel()


def _write_signals_to(sender: socket.socket) -> None:
    """Unless somebody has them written elsewhere, who then wakes the loop."""
    before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    if before != -1:
        signal.set_wakeup_fd(before)
