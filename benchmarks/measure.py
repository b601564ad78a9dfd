"""How benchmarks measure, and the scenarios that the tables and the pytest suites have in common.

Tables take the best of interleaved rounds in one process, so that a busy machine slows all alike. The suites put a
round of a reference before each round (`timed`), so that the gate can judge the quotient of the fastest of both: a
machine that is slower today slows both. They count CPU time, which other work on the machine moves far less than it
moves the wall clock. What runs in virtual time is exact: its figures come from the queue's own records (`recorded`).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import os
import platform
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import llmq
from llmq import LLMQueue, RuntimeEnv, Settings
from llmq.tune.point import Setting, Window
from llmq.tune.point import measure as measure_point

WAITERS = 10_000
ROUNDS = 7
SLOTS = 64
SLOWER = "LLMQ_BENCH_SLOWER"
"""Environment variable `NAME=FACTOR` of the gate's own trial: one benchmark takes so much longer."""

T = TypeVar("T")

Scenario = Callable[[], Awaitable[None]]


@dataclass
class Line:
    """One bound, what was found, and whether it holds."""

    what: str
    found: str
    bound: str
    holds: bool

    def __str__(self) -> str:
        return f"| {self.what} | {self.found} | {self.bound} | {'yes' if self.holds else '**missed**'} |"


async def nothing(_: object = None) -> None:
    """A call that does nothing."""


async def best_of(scenarios: dict[str, Scenario], calls: int) -> dict[str, float]:
    """Microseconds a call, the best of interleaved rounds."""
    found = dict.fromkeys(scenarios, float("inf"))
    for _ in range(ROUNDS):
        for name, scenario in scenarios.items():
            gc.collect()
            began = time.perf_counter()
            await scenario()
            found[name] = min(found[name], (time.perf_counter() - began) / calls * 1e6)
    return found


def in_turn(enter: Callable[[], contextlib.AbstractAsyncContextManager[object]], calls: int) -> Scenario:
    """One task takes and gives back."""

    async def run() -> None:
        for _ in range(calls):
            async with enter():
                pass

    return run


def awaited(call: Callable[[], Awaitable[object]], calls: int) -> Scenario:
    """One task awaits."""

    async def run() -> None:
        for _ in range(calls):
            await call()

    return run


def at_once(call: Callable[[], Awaitable[object]], tasks: int = WAITERS) -> Scenario:
    """A task for each call, all at once."""

    async def run() -> None:
        await asyncio.gather(*[call() for _ in range(tasks)])

    return run


def holding(enter: Callable[[], contextlib.AbstractAsyncContextManager[object]]) -> Callable[[], Awaitable[None]]:
    """A call that holds what it entered for one turn of the loop."""

    async def call() -> None:
        async with enter():
            await asyncio.sleep(0)

    return call


def uncontended(calls: int) -> dict[str, Scenario]:
    """To take a slot and give it back, with nobody else there. Sets the process up with the flag off."""
    semaphore, queue = asyncio.Semaphore(SLOTS), LLMQueue(SLOTS, telemetry=None)
    RuntimeEnv.reset()
    RuntimeEnv.initialize(Settings(llm_queue_enabled=False))
    return {
        "plain await": awaited(nothing, calls),
        "flag off": awaited(lambda: llmq.submit(nothing), calls),
        "asyncio.Semaphore": in_turn(lambda: semaphore, calls),
        "LLMQueue.slot": in_turn(queue.slot, calls),
        "LLMQueue.submit": awaited(lambda: queue.submit(nothing), calls),
    }


def contended(tasks: int = WAITERS) -> dict[str, Scenario]:
    """So many tasks on 64 slots; the tasks' own cost is in all of them."""
    semaphore, queue = asyncio.Semaphore(SLOTS), LLMQueue(SLOTS, telemetry=None)
    return {
        "plain await": at_once(lambda: asyncio.sleep(0), tasks),
        "asyncio.Semaphore": at_once(holding(lambda: semaphore), tasks),
        "LLMQueue.slot": at_once(holding(queue.slot), tasks),
        "LLMQueue.submit": at_once(lambda: queue.submit(lambda: asyncio.sleep(0)), tasks),
    }


def timed(
    benchmark: Any,
    runner: asyncio.Runner,
    run: Callable[[], Awaitable[T]],
    reference: Scenario,
    *,
    rounds: int,
    judged: bool = True,
    timer: Callable[[], float] = time.process_time,
) -> T:
    """Time `run` by rounds, each after one of the reference, whose seconds go into `extra_info`.

    `timer`: the one in the mark of the benchmark. `judged`: whether the gate should look at it; peers and libraries of
    others are there to be looked at by people.
    """
    seconds: list[float] = []

    def before() -> None:
        gc.collect()
        began = timer()
        runner.run(reference())
        seconds.append(timer() - began)

    gc.collect()
    gc.freeze()
    target = _slowed(functools.partial(_run, runner, run), _planted(benchmark.name), timer)
    found: T = benchmark.pedantic(target, setup=before, rounds=rounds, warmup_rounds=1)
    gc.unfreeze()
    benchmark.extra_info.update(judged=judged, reference_seconds=seconds[-rounds:])
    return found


def recorded(benchmark: Any, queue: LLMQueue, start: float, end: float, *, virtual: bool) -> None:
    """Put what the queue recorded between two moments of its loop's clock into `extra_info`."""
    point = measure_point(Setting(queue.max_concurrency), queue.records(), Window(start, end, 0.0))
    names = ("goodput", "service_p50", "service_p95", "wait_p50", "wait_p95", "share_429", "in_flight")
    benchmark.extra_info.update({name: getattr(point, name) for name in names}, virtual=virtual)


def _run(runner: asyncio.Runner, run: Callable[[], Awaitable[T]]) -> T:
    return runner.run(run())  # type: ignore[arg-type]


def _planted(name: str) -> float:
    slower, _, factor = os.environ.get(SLOWER, "").rpartition("=")
    return float(factor) if slower == name else 1.0


def _slowed(run: Callable[[], T], factor: float, timer: Callable[[], float]) -> Callable[[], T]:
    """The same, `factor` times as long."""
    if factor == 1.0:
        return run

    def slow() -> T:
        began = timer()
        found = run()
        until = began + factor * (timer() - began)
        while timer() < until:
            pass
        return found

    return slow


def machine() -> str:
    """Where this runs."""
    return f"a virtual machine with 2 cores, {platform.machine()}, Python {platform.python_version()}"


def put_into(path: Path, mark: str, text: str) -> None:
    """Replace what stands between a document's marks."""
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    old = path.read_text(encoding="utf-8")
    assert begin in old, f"{path} has no {begin}"
    assert end in old, f"{path} has no {end}"
    path.write_text(re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{text}\n{end}", old, flags=re.DOTALL), "utf-8")
