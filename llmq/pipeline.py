"""Stages with dependencies, run over items: a few calls for each item, each stage as soon as what it needs is there.

    async def outline(topic): ...
    async def draft(topic, outline): ...        # parameters after the first name the stages it needs
    async def title(topic, draft): ...

    pipeline = Pipeline([outline, draft, title])
    async with pipeline.run(topics) as outcomes:
        async for outcome in outcomes: ...      # .result is {stage: result}, or .error

With a queue, stages of an item and items overlap and the queue alone bounds the calls: an older item's later
stages go before a newer one's first, so that results come out early. Without one, each item's stages run one
after the other. In both, an error ends its item and no other, and at most a window of items is open.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio

from llmq.core import LLMTaskMeta
from llmq.errors import QueueHaltedError
from llmq.items import ItemRun
from llmq.progress import Bar, ItemProgress, Progress, size_of
from llmq.queue import LLMQueue
from llmq.retry import Retry
from llmq.runtime import RuntimeEnv, active_queue, using
from llmq.unqueued import unqueued
from llmq.waiters import is_own_cancellation

T = TypeVar("T")


@dataclass(frozen=True)
class Stage:
    """One step: `await call(item, *results of after)`.

    A gated stage is one call to the provider and takes one slot; what it submits itself takes no second one. With
    `gated=False` the stage takes none, for one that sends its own calls through `llmq.submit`, or makes none.
    """

    name: str
    call: Callable[..., Awaitable[Any]]
    after: tuple[str, ...] = ()
    gated: bool = True
    model_name: str | None = None

    @classmethod
    def of(cls, call: Callable[..., Awaitable[Any]]) -> Stage:
        """A stage named like its function; the parameters after the first name the stages it needs."""
        parameters = list(inspect.signature(call).parameters)
        if not parameters:
            raise ValueError(f"{call.__name__}() takes no argument; a stage takes the item first")
        return cls(call.__name__, call, tuple(parameters[1:]))


class Pipeline:
    """An acyclic set of stages. Raises ValueError for a name that is there twice, missing, or needs itself."""

    def __init__(self, stages: Iterable[Stage | Callable[..., Awaitable[Any]]]) -> None:
        self.stages: tuple[Stage, ...] = _in_order([s if isinstance(s, Stage) else Stage.of(s) for s in stages])
        self._dependents: dict[str, list[Stage]] = {stage.name: [] for stage in self.stages}
        for stage in self.stages:
            for name in stage.after:
                self._dependents[name].append(stage)

    def run(
        self,
        items: Iterable[T] | AsyncIterable[T],
        *,
        open_items: int | None = None,
        ordered: bool = False,
        retry: Retry | None = None,
        progress: bool = False,
    ) -> ItemRun[T, dict[str, Any]]:
        """Run every item through the stages, through the queue in force when this is called.

        At most `open_items` items are open at once (default: the setting `concurrency`); with a queue as many as
        it has slots, if that is more. `retry` applies to each gated stage. `progress` shows a bar a stage, in a
        terminal, a notebook or a log (`llmq.progress`).
        """
        queue = active_queue()
        if open_items is None:
            open_items = RuntimeEnv.instance().settings.concurrency
        if open_items < 1:
            raise ValueError(f"open_items must be at least 1, got {open_items}")
        least = open_items
        shown = Progress(Bar(stage.name, size_of(items)) for stage in self.stages) if progress else None

        async def run_one(index: int, item: T) -> dict[str, Any]:
            on_way = None if shown is None else ItemProgress(shown)
            with using(queue), on_way or nullcontext():  # also for what an ungated stage submits
                if queue is None:
                    return await self._run_in_turn(item, retry, on_way)
                return await self._run_overlapped(queue, index, item, retry, on_way)

        return ItemRun(
            run_one,
            items,
            lambda: least if queue is None else max(least, queue.max_concurrency),
            ordered=ordered,
            progress=shown,
        )

    async def _run_in_turn(self, item: object, retry: Retry | None, on_way: ItemProgress | None) -> dict[str, Any]:
        results: dict[str, Any] = {}
        for stage in self.stages:
            call = _bound(stage, item, results, on_way)
            with _counted(on_way, stage):
                results[stage.name] = await (unqueued(call, retry=retry) if stage.gated else call())
        return results

    async def _run_overlapped(
        self, queue: LLMQueue, rank: int, item: object, retry: Retry | None, on_way: ItemProgress | None
    ) -> dict[str, Any]:
        results: dict[str, Any] = {}
        failures: list[BaseException] = []

        async def run_stage(stage: Stage) -> None:
            call = _bound(stage, item, results, on_way)
            try:
                with _counted(on_way, stage):
                    if stage.gated:
                        meta = LLMTaskMeta(stage.name, stage.model_name, rank=rank)
                        holding = functools.partial(_ungated, call)
                        results[stage.name] = await queue.submit(holding, meta=meta, retry=retry)
                    else:
                        results[stage.name] = await call()
            except BaseException as error:
                if is_own_cancellation(error):
                    raise
                failures.append(error)
                if not isinstance(error, QueueHaltedError):  # then what is in flight is paid for, and may be cached
                    group.cancel_scope.cancel()  # what the item's other stages would bring is lost anyway
                return
            for dependent in self._dependents[stage.name]:
                if not failures and all(name in results for name in dependent.after):
                    group.start_soon(run_stage, dependent)

        async with anyio.create_task_group() as group:
            for stage in self.stages:
                if not stage.after:
                    group.start_soon(run_stage, stage)
        if failures:
            raise failures[0]
        return {stage.name: results[stage.name] for stage in self.stages}


async def _ungated(call: Callable[[], Awaitable[Any]]) -> Any:
    """Run a call that holds a slot: what it submits itself must not wait for a second one."""
    with using(None):
        return await call()


def _bound(
    stage: Stage, item: object, results: Mapping[str, Any], on_way: ItemProgress | None
) -> Callable[[], Awaitable[Any]]:
    call = functools.partial(stage.call, item, *(results[name] for name in stage.after))
    return call if on_way is None else on_way.attempt(stage.name, call)


def _counted(on_way: ItemProgress | None, stage: Stage) -> AbstractContextManager[None]:
    return nullcontext() if on_way is None else on_way.stage(stage.name)


def _in_order(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """The stages as given, checked: each needs only stages before it."""
    known: set[str] = set()
    names = [stage.name for stage in stages]
    for stage in stages:
        if stage.name in known:
            raise ValueError(f"two stages are named {stage.name!r}")
        for name in stage.after:
            if name not in known:
                why = "stands after it" if name in names else "does not exist"
                raise ValueError(f"stage {stage.name!r} needs {name!r}, which {why}; a stage comes after what it needs")
        known.add(stage.name)
    if not stages:
        raise ValueError("a pipeline needs at least one stage")
    return tuple(stages)
