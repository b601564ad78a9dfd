"""How benchmarks measure: the best of interleaved rounds in one process, so that a busy machine slows all alike."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import platform
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

WAITERS = 10_000
ROUNDS = 7

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


def at_once(call: Callable[[], Awaitable[object]]) -> Scenario:
    """A task for each of 10,000 calls."""

    async def run() -> None:
        await asyncio.gather(*[call() for _ in range(WAITERS)])

    return run


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
