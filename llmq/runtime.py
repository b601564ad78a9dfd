"""The process's one queue, switched on by a flag.

With the flag off `submit` awaits its factory and nothing else, so results are the same; with it on, every call
of the process goes through one `LLMQueue`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, TypeVar

from llmq.core import LLMTaskMeta
from llmq.errors import RuntimeInUseError
from llmq.interrupt import mind_interrupts
from llmq.operations import Slot
from llmq.queue import LLMQueue
from llmq.retry import Retry
from llmq.telemetry import Telemetry
from llmq.unqueued import unqueued

if TYPE_CHECKING:
    from llmq.settings import Settings

T = TypeVar("T")

_chosen: ContextVar[LLMQueue | None] = ContextVar("llmq_queue")


class RuntimeEnv:
    """The settings in force and their queue. Made by `initialize`, or by `instance` on first use."""

    _instance: ClassVar[RuntimeEnv | None] = None
    _guard: ClassVar[threading.RLock] = threading.RLock()

    def __init__(self, settings: Settings) -> None:
        mind_interrupts()
        self.settings = settings
        self.llm_queue: LLMQueue | None = None
        if settings.llm_queue_enabled:
            policy = settings.queue_policy
            self.llm_queue = LLMQueue(
                policy.max_concurrency,
                limits=policy.limits,
                overflow=policy.overflow,
                ageing_seconds=policy.ageing_seconds,
                strict=policy.strict,
                fair_share=policy.fair_share,
                queue_timeout=settings.queue_timeout,
                request_timeout=settings.request_timeout,
                telemetry=Telemetry(
                    service_id=settings.llm_telemetry_service_id,
                    attempts=settings.llm_telemetry_attempts,
                    content=settings.llm_telemetry_content,
                ),
                ledger=settings.ledger(),
            )

    @classmethod
    def initialize(cls, settings: Settings | None = None) -> RuntimeEnv:
        """Set the process up, by default from `Settings()`.

        Raises `RuntimeInUseError` if it is set up already with other settings; `reset()` first.
        """
        from llmq.settings import Settings

        settings = Settings() if settings is None else settings
        with cls._guard:
            if cls._instance is None:
                cls._instance = cls(settings)
            elif cls._instance.settings.model_dump() != settings.model_dump():
                raise RuntimeInUseError(
                    "llmq is set up already, with other settings: "
                    + _differences(cls._instance.settings, settings)
                    + "; call RuntimeEnv.reset() first"
                )
            return cls._instance

    @classmethod
    def instance(cls) -> RuntimeEnv:
        """What is in force; set up from `Settings()` on first use."""
        found = cls._instance
        return cls.initialize() if found is None else found

    @classmethod
    def reset(cls) -> None:
        """Forget settings and queue. Raises `RuntimeInUseError` while calls are open."""
        with cls._guard:
            queue = None if cls._instance is None else cls._instance.llm_queue
            if queue is not None and queue.open_operations:
                raise RuntimeInUseError(
                    f"{queue.open_operations} calls are open in the queue; await queue.drain() before reset()"
                )
            cls._instance = None


def active_queue() -> LLMQueue | None:
    """The queue that calls made here go through: the one chosen by `using`, else the process's; None: flag off."""
    try:
        return _chosen.get()
    except LookupError:
        return RuntimeEnv.instance().llm_queue


@contextmanager
def using(queue: LLMQueue | None) -> Iterator[None]:
    """Let the calls made in this block, and by tasks started in it, go through `queue`, or through none."""
    token = _chosen.set(queue)
    try:
        yield
    finally:
        _chosen.reset(token)


async def submit(
    factory: Callable[[], Awaitable[T]], *, meta: LLMTaskMeta | None = None, retry: Retry | None = None
) -> T:
    """Await `factory()`: through the queue if the flag is on, and simply so if it is off.

    `retry` works the same in both. See `LLMQueue.submit`.
    """
    queue = active_queue()
    if queue is not None:
        return await queue.submit(factory, meta=meta, retry=retry)
    if retry is None:
        return await factory()
    return await unqueued(factory, retry=retry)


class limiter:
    """At most `max_concurrency` blocks `async with limit:` at once, unless the queue is on; then none is held.

    For code that had a semaphore of its own: it keeps its bound with the flag off, and there is no double
    gating with it on. Works across event loops and threads, as the queue does.
    """

    def __init__(self, max_concurrency: int) -> None:
        self._queue = LLMQueue(max_concurrency, telemetry=None, max_records=0)
        self._held: deque[Slot] = deque()
        self._stepped_aside = 0
        self._guard = threading.Lock()

    async def __aenter__(self) -> None:
        if active_queue() is not None:
            with self._guard:
                self._stepped_aside += 1
            return
        slot = self._queue.slot()
        await slot.__aenter__()
        self._held.append(slot)

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Blocks are alike, so any one's end may be booked on any other: first those that hold nothing, which
        # can only make the limiter stricter while a run goes over from one mode to the other.
        with self._guard:
            if self._stepped_aside:
                self._stepped_aside -= 1
                return
        self._held.pop().release(exc)


def _differences(old: Settings, new: Settings) -> str:
    names = [name for name in type(old).model_fields if getattr(old, name) != getattr(new, name)]
    return ", ".join(f"{name}={getattr(old, name)!r} is not {getattr(new, name)!r}" for name in names)
