"""What the queue costs, beside what users would write instead: the table of the README.

    python benchmarks/table.py            prints it
    python benchmarks/table.py --write    also puts it into the README

A bound that is not met is said to be missed; the exit code does not depend on it, since speed is no test.
"""

from __future__ import annotations

import asyncio
import gc
import resource
import sys
import time
import tracemalloc
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import aiolimiter
import aiometer
import anyio
from measure import (
    ROUNDS,
    SLOTS,
    WAITERS,
    Line,
    at_once,
    best_of,
    contended,
    holding,
    in_turn,
    machine,
    nothing,
    put_into,
    uncontended,
)
from pydantic_ai.concurrency import ConcurrencyLimiter

from llmq import Cap, LLMQueue, LLMTaskMeta, Outcome, Policy, Priority, Rate
from llmq.core import Job, Scheduler, State

README = Path(__file__).parent.parent / "README.md"


class _PydanticAI:
    """pydantic-ai's limiter, as a block."""

    def __init__(self, limiter: ConcurrencyLimiter) -> None:
        self._limiter = limiter

    async def __aenter__(self) -> None:
        await self._limiter.acquire("bench")

    async def __aexit__(self, *error: object) -> None:
        self._limiter.release()


async def alone() -> dict[str, float]:
    """Microseconds to take a slot and give it back, with nobody else there."""
    calls = 20_000
    plain, pydantic_ai = aiolimiter.AsyncLimiter(1e9, 1), _PydanticAI(ConcurrencyLimiter(SLOTS))
    peers = {
        "anyio.CapacityLimiter": in_turn(_capacity_limiter(), calls),
        "aiolimiter": in_turn(lambda: plain, calls),
        "pydantic-ai ConcurrencyLimiter": in_turn(lambda: pydantic_ai, calls),
    }
    return await best_of({**uncontended(calls), **peers}, calls)


def _capacity_limiter() -> Callable[[], anyio.CapacityLimiter]:
    limiter = anyio.CapacityLimiter(SLOTS)
    return lambda: limiter


async def crowded() -> dict[str, float]:
    """Microseconds a call, 10,000 tasks on 64 slots; the tasks' own cost is in all of them."""
    fast, pydantic_ai = aiolimiter.AsyncLimiter(1e9, 1), _PydanticAI(ConcurrencyLimiter(SLOTS))

    async def meter() -> None:
        await aiometer.run_on_each(lambda _: asyncio.sleep(0), range(WAITERS), max_at_once=SLOTS)

    peers = {
        "anyio.CapacityLimiter": at_once(holding(_capacity_limiter())),
        "aiolimiter": at_once(holding(lambda: fast)),
        "aiometer.run_on_each": meter,
        "pydantic-ai ConcurrencyLimiter": at_once(holding(lambda: pydantic_ai)),
    }
    return await best_of({**contended(), **peers}, WAITERS)


async def draining() -> dict[str, float]:
    """CPU seconds for 100,000 calls that do nothing."""
    calls = 100_000
    semaphore, queue = asyncio.Semaphore(SLOTS), LLMQueue(SLOTS, telemetry=None)

    async def task_each() -> None:
        async def call() -> None:
            async with semaphore:
                await nothing()

        await asyncio.gather(*[call() for _ in range(calls)])

    async def mapped() -> None:
        async with queue.map(nothing, range(calls)) as outcomes:
            async for _ in outcomes:
                pass

    found: dict[str, float] = {"a task each on a semaphore": float("inf"), "LLMQueue.map": float("inf")}
    for _ in range(3):
        for name, run in zip(found, (task_each, mapped), strict=True):
            gc.collect()
            began = time.process_time()
            await run()
            found[name] = min(found[name], time.process_time() - began)
    return found


async def mapped_million() -> tuple[float, float]:
    """Seconds for a million items, and by how many MiB the process grew from the 10th part on."""
    queue, total, after_tenth = LLMQueue(SLOTS, telemetry=None, max_records=1000), 1_000_000, 0.0
    began, done = time.perf_counter(), 0
    async with queue.map(nothing, range(total)) as outcomes:
        async for _ in outcomes:
            done += 1
            if done == total // 10:
                after_tenth = _peak_mib()
    assert done == total
    return time.perf_counter() - began, _peak_mib() - after_tenth


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


async def bytes_a_waiter(count: int = 100_000) -> float:
    """Memory of a call that waits in `slot()`, beyond that of its task."""

    async def measure(wait: Callable[[], Awaitable[None]]) -> float:
        gc.collect()
        tracemalloc.start()
        tasks = [asyncio.ensure_future(wait()) for _ in range(count)]
        await asyncio.sleep(0)
        gc.collect()
        used = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return used / count

    never_set = asyncio.Event()
    queue = LLMQueue(1, telemetry=None)

    async def parked() -> None:
        await never_set.wait()

    async def waiting() -> None:
        async with queue.slot():
            pass

    async with queue.slot():
        with_queue = await measure(waiting)
    return with_queue - await measure(parked)


def core_pairs_a_second(waiting: int, pairs: int = 100_000) -> float:
    """Submit-and-finish pairs a second of the core alone, one cap."""
    rates = []
    for _ in range(5):
        scheduler, running = Scheduler(Policy(SLOTS)), deque[Job]()
        jobs = [Job() for _ in range(pairs + waiting + SLOTS)]
        for job in jobs[pairs:]:
            scheduler.submit(job, 0.0)
        running.extend(job for job in jobs[pairs:] if job.state is State.RUNNING)
        began = time.perf_counter()
        for job in jobs[:pairs]:
            scheduler.submit(job, 0.0)
            if job.state is State.RUNNING:
                running.append(job)
            running.extend(scheduler.finish(running.popleft(), Outcome.SUCCEEDED, 0.0) or ())
        rates.append(pairs / (time.perf_counter() - began))
    return max(rates)


class _Deep:
    """A scheduler with many waiting over 1,000 keys, with priorities, caps and rates, at work."""

    def __init__(self, waiting: int) -> None:
        limits = (Cap(2, by="model_name"), Rate(6000, by="model_name"), Rate(1e9, of="tokens"), Cap(50, by="agent"))
        self.scheduler = Scheduler(Policy(SLOTS, limits))
        self.now = 0.0
        self.number = 0
        self.running: deque[Job] = deque()
        for _ in range(waiting + SLOTS):
            self.submit()

    def submit(self) -> None:
        """A newcomer, of the next key."""
        self.number += 1
        key = self.number % 1000
        meta = LLMTaskMeta(
            model_name=f"m{key}",
            priority=Priority(key % 4),
            rank=self.number % 7,
            tokens=10,
            labels={"agent": f"a{key % 10}"},
        )
        job = Job(meta)
        self._started([*self.scheduler.submit(job, self.now), job])

    def step(self) -> None:
        """One ends, one comes, time goes on."""
        self.now += 0.001
        job = self.running.popleft()
        job.used_tokens = 12
        self._started(self.scheduler.finish(job, Outcome.SUCCEEDED, self.now) or ())
        self.submit()
        while not self.running:
            self.now = self.scheduler.deadline or self.now
            self._started(self.scheduler.tick(self.now))

    def _started(self, jobs: object) -> None:
        self.running.extend(job for job in jobs if job.state is State.RUNNING)  # type: ignore[attr-defined]


def deep(waiting: int, steps: int = 5000) -> tuple[float, float]:
    """Calls of functions inside the core, and microseconds, a step with so many waiting."""
    counted = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal counted
        counted += event in ("call", "c_call")

    work = _Deep(waiting)
    sys.setprofile(count)
    for _ in range(steps):
        work.step()
    sys.setprofile(None)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(steps):
            work.step()
        times.append((time.perf_counter() - began) / steps * 1e6)
    work.scheduler.check()
    return counted / steps, min(times)


def peers_table(single: dict[str, float], many: dict[str, float]) -> Iterator[str]:
    """The peers, with ratios to asyncio.Semaphore."""
    yield "| | uncontended, µs | x Semaphore | 10,000 tasks on 64 slots, µs | x Semaphore |"
    yield "|---|---|---|---|---|"
    for name in dict.fromkeys([*single, *many]):
        if name == "flag off":
            continue
        cells = []
        for found in (single, many):
            value = found.get(name)
            cells += ["-", "-"] if value is None else [f"{value:.2f}", f"{value / found['asyncio.Semaphore']:.1f}"]
        yield f"| {name} | {' | '.join(cells)} |"


async def measure() -> str:
    """Everything, as Markdown."""
    single, many, drained = await alone(), await crowded(), await draining()
    few_calls, few_time = deep(1000)
    many_calls, many_time = deep(100_000)
    core, core_deep = core_pairs_a_second(0), core_pairs_a_second(WAITERS)
    waiter = await bytes_a_waiter()
    seconds, grown = await mapped_million()
    off = single["flag off"] - single["plain await"]
    slot, slots = (found["LLMQueue.slot"] / found["asyncio.Semaphore"] for found in (single, many))
    lines = [
        Line("flag off: `llmq.submit` over the plain await", f"{off:.2f} µs", "1 µs", off <= 1),
        Line("`slot()`, uncontended, to `asyncio.Semaphore`", f"{slot:.2f} x", "2 x", slot <= 2),
        Line("`slot()`, 10,000 tasks on 64 slots, to the same", f"{slots:.2f} x", "1.3 x", slots <= 1.3),
        Line(
            "core, 100,000 waiting over 1,000 keys, to 1,000 waiting: operations",
            f"{many_calls / few_calls:.2f} x ({many_calls:.0f} calls a step)",
            "2 x",
            many_calls <= 2 * few_calls,
        ),
        Line("the same: time", f"{many_time / few_time:.2f} x ({many_time:.0f} µs)", "3 x", many_time <= 3 * few_time),
        Line("memory of a waiting `slot()` beyond its task", f"{waiter:.0f} B", "1,536 B", waiter <= 1536),
        Line(
            "`map` over 100,000 no-op calls, CPU (a task each on a semaphore: "
            f"{drained['a task each on a semaphore']:.2f} s)",
            f"{drained['LLMQueue.map']:.2f} s",
            "1.5 s",
            drained["LLMQueue.map"] <= 1.5,
        ),
        Line(
            f"`map` over 1,000,000: growth of the process after the first tenth ({seconds:.0f} s in all)",
            f"{grown:.1f} MiB",
            "flat: 5 MiB",
            grown <= 5,
        ),
        Line(
            "core alone, one cap, submit-and-finish pairs a second (10,000 waiting)",
            f"{core / 1e6:.2f} million ({core_deep / 1e6:.2f})",
            "0.3 million",
            min(core, core_deep) >= 0.3e6,
        ),
    ]
    table = ["| what | found | bound | holds |", "|---|---|---|---|", *map(str, lines)]
    return "\n".join(
        [
            f"`make bench-tables` on {machine()}, best of {ROUNDS} interleaved rounds:",
            "",
            *table,
            "",
            *peers_table(single, many),
        ]
    )


def main() -> None:
    """Measure, print, and perhaps write."""
    text = asyncio.run(measure())
    print(text)
    if "--write" in sys.argv[1:]:
        put_into(README, "make bench", text)


if __name__ == "__main__":
    main()
