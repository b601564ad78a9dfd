"""A virtual clock for asyncio: time jumps to the next timer as soon as nothing else is left to do.

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())          # an hour of asyncio.sleep takes a moment
    await in_virtual_time(main)     # the same where a loop runs already

Only what waits by the loop's own timers is virtual. Sockets, processes and worker threads run in real time, and no
jump would wait for them, so they are refused with `VirtualTimeError`:

- what asks the loop for them (connections, servers, name look-ups, subprocesses, `asyncio.to_thread`) meets the error
  where it asks. An SDK may wrap it: it is then the `__cause__` of openai's `APIConnectionError`.
- `anyio.to_thread.run_sync` starts its thread past the loop. The error ends the loop's run, as soon as time would jump.

A plain thread may still wake a task (`call_soon_threadsafe`) that waits for it while others are busy; the clock does
not wait for it. trio has its own virtual clock, `trio.testing.MockClock(autojump_threshold=0)`.
"""

import asyncio
import contextlib
import contextvars
import selectors
import threading
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from typing import Any, Generic, NoReturn, TypeVar

from llmq.errors import VirtualTimeError
from llmq.waiters import use_loop_clocks

R = TypeVar("R")


class VirtualDeadlock(RuntimeError):
    """Every task waits for another one and no timer is set: in real time this would hang for ever."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """An asyncio event loop whose `time()` starts at 0 and moves only when every task waits.

    What cannot be virtual raises `VirtualTimeError`, see the module.
    """

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


async def in_virtual_time(work: Coroutine[Any, Any, R] | Callable[[], Coroutine[Any, Any, R]]) -> R:
    """Await a coroutine, or an async function without arguments, on a virtual clock; its result.

    For where a loop runs in real time already, such as a notebook's cell. It runs on a `VirtualLoop` of its own, in a
    thread of its own; cancelled with the caller, who waits until it has ended. On a `VirtualLoop` it is just awaited.
    Raises what it raises, `VirtualDeadlock`, `VirtualTimeError` for what cannot be virtual, and TypeError for what is
    neither.
    """
    if not callable(work) and not asyncio.iscoroutine(work):
        raise TypeError(f"in_virtual_time() needs a coroutine, main(), or an async function, main; got {work!r}")
    if isinstance(asyncio.get_running_loop(), VirtualLoop):
        return await (work() if callable(work) else work)
    run = _VirtualRun(work, contextvars.copy_context())
    ended = asyncio.wrap_future(run.ended)
    cancelled: asyncio.CancelledError | None = None
    while not ended.done():
        try:
            await asyncio.wait([ended])
        except asyncio.CancelledError as error:
            cancelled = error
            run.cancel()
    run.thread.join()  # it has told its end, and has no more to do
    if cancelled is not None:
        if not ended.cancelled():
            ended.exception()  # looked at: whatever it was, we were cancelled
        raise cancelled
    return ended.result()


class _VirtualRun(Generic[R]):
    """Work on a loop and in a thread of its own. A thread, and no executor's worker: none may be free for its end."""

    def __init__(
        self, work: Coroutine[Any, Any, R] | Callable[[], Coroutine[Any, Any, R]], context: contextvars.Context
    ) -> None:
        self.ended: Future[R] = Future()
        self._work = work
        self._context = context
        self._guard = threading.Lock()
        self._loop = VirtualLoop()
        self._task: asyncio.Task[R] | None = None
        self._cancelled = False
        self.thread = threading.Thread(target=self._run, name="llmq-virtual", daemon=True)
        self.thread.start()

    def cancel(self) -> None:
        """From the caller's thread."""
        with self._guard:
            self._cancelled = True
            if self._task is not None:
                with contextlib.suppress(RuntimeError):  # it has ended, and its loop is closed
                    self._loop.call_soon_threadsafe(self._task.cancel)

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                result = runner.run(self._begun(), context=self._context)
        except asyncio.CancelledError:
            self.ended.cancel()
        except BaseException as error:
            self.ended.set_exception(error)
        else:
            self.ended.set_result(result)
        finally:
            self._loop.close()

    async def _begun(self) -> R:
        with self._guard:
            self._task = task = asyncio.ensure_future(self._work() if callable(self._work) else self._work)
            if self._cancelled:
                task.cancel()
        return await task


class _JumpingSelector(selectors.BaseSelector):
    """Where the real selector would wait, polls it, and if nothing is there the loop's clock jumps."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._real = selectors.DefaultSelector()
        self._threads = threading.active_count()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout <= 0:
            return []  # tasks are ready; what a thread wakes is among them already
        ready = self._real.select(0)
        if ready:
            return ready
        self._refuse_workers()
        if timeout is None:
            raise VirtualDeadlock(
                f"nothing is left to run or to wait for at virtual {self._loop.time():.6f} s "
                "(what only a thread would wake is not waited for)"
            )
        self._loop.jump(timeout)
        return []

    def _refuse_workers(self) -> None:
        """Raise if a worker thread of anyio serves the loop. It is one that the loop did not see start."""
        if threading.active_count() == self._threads:
            return
        if any(getattr(thread, "loop", None) is self._loop for thread in threading.enumerate()):
            raise VirtualTimeError(_message("a worker thread (anyio.to_thread.run_sync)"))
        self._threads = threading.active_count()

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


def _message(asked_for: str) -> str:
    return (
        f"{asked_for} was asked for on a VirtualLoop, whose clock would not wait for it. "
        "Call the in-process provider (llmq.testing.SimulatedProvider), or run in real time, on a plain asyncio loop."
    )


_REAL_TIME_ONLY = {
    "a socket": (
        "create_connection create_unix_connection create_server create_unix_server create_datagram_endpoint "
        "connect_accepted_socket start_tls sendfile sock_connect sock_accept sock_recv sock_recv_into sock_recvfrom "
        "sock_recvfrom_into sock_sendall sock_sendto sock_sendfile add_reader add_writer"
    ),
    "a name look-up": "getaddrinfo getnameinfo",
    "a process or pipe": "subprocess_exec subprocess_shell connect_read_pipe connect_write_pipe",
    "a worker thread": "run_in_executor",
}


def _refusal(asked_for: str, name: str) -> Any:
    def refuse(self: VirtualLoop, *args: object, **options: object) -> NoReturn:
        raise VirtualTimeError(_message(f"{asked_for} ({name})"))

    return refuse


for _asked_for, _names in _REAL_TIME_ONLY.items():
    for _name in _names.split():
        setattr(VirtualLoop, _name, _refusal(_asked_for, _name))
