"""A million calls through the real shell with random cancellation: none lost, none doubled, never above the cap.

    python benchmarks/soak.py [calls]

Real event loop, real time. Calls come by `submit` and by `slot`, with and without metadata; a fifth is cancelled at a
random moment, some fail, and the cap is changed now and then. Exit code 1 if anything does not add up.
"""

from __future__ import annotations

import asyncio
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator

from llmq import Cap, LLMQueue, LLMTaskMeta, Outcome, Priority

CAP, AT_ONCE = 16, 500
METAS = [None, None, *(LLMTaskMeta("soak", f"m{n % 3}", priority=Priority(n % 4), rank=n) for n in range(8))]


class Soak:
    """The calls' side of it: how many are inside, and what became of each."""

    def __init__(self, calls: int, seed: int = 0) -> None:
        self.calls = calls
        self.random = random.Random(seed)
        limits = [Cap(10, by="model_name")] if seed % 2 else []
        self.queue = LLMQueue(CAP, limits=limits, telemetry=None, max_records=100)
        self.inside = self.peak = 0
        self.ended: Counter[str] = Counter()
        self.seen = bytearray(calls)

    async def call(self, number: int) -> None:
        """What is called: once for each number."""
        self.seen[number] += 1
        self.inside += 1
        self.peak = max(self.peak, self.inside)
        try:
            for _ in range(1 + number % 3):
                await asyncio.sleep(0)
            if number % 50 == 7:
                raise ValueError("mine")
        finally:
            self.inside -= 1

    async def submit(self, number: int) -> None:
        """One call, by either way."""
        meta = METAS[number % len(METAS)]
        if number % 2:
            await self.queue.submit(lambda: self.call(number), meta=meta)
        else:
            async with self.queue.slot(meta):
                await self.call(number)

    async def worker(self, numbers: Iterator[int]) -> None:
        """Call after call; a fifth is cancelled."""
        for number in numbers:
            if number % 5:
                self.ended[await self.outcome(self.submit(number))] += 1
                continue
            task = asyncio.ensure_future(self.submit(number))
            for _ in range(self.random.randrange(12)):
                await asyncio.sleep(0)
            task.cancel()
            self.ended[await self.outcome(task)] += 1

    async def outcome(self, call: object) -> str:
        """How a call ended."""
        try:
            await call  # type: ignore[misc]
        except ValueError:
            return "failed"
        except asyncio.CancelledError:
            return "cancelled"
        return "ok"

    async def run(self) -> list[float]:
        """All of them; the peak memory in MiB at each tenth."""
        numbers, memory = iter(range(self.calls)), list[float]()

        def watched() -> Iterator[int]:
            for number in numbers:
                if number % (self.calls // 10) == 0:
                    memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
                if number % 5000 == 0:
                    self.queue.resize(CAP if number % 10_000 else CAP // 2)
                yield number

        shared = watched()
        await asyncio.gather(*[self.worker(shared) for _ in range(AT_ONCE)])
        return memory


def main(calls: int = 1_000_000) -> int:
    """Run it twice, without limits and with; say what was found."""
    wrong = 0
    for seed, share in ((0, calls // 2), (1, calls - calls // 2)):
        soak = Soak(share, seed)
        began = time.monotonic()
        memory = asyncio.run(soak.run())
        soak.queue._scheduler.check()
        found = soak.queue.statistics()
        ended = found.abandoned + sum(found.ended.values())
        print(
            f"{share} calls in {time.monotonic() - began:.0f} s: {dict(soak.ended)}, {max(soak.seen)} times at most, "
            f"peak {soak.peak} of {CAP}, memory {memory[1]:.0f} to {memory[-1]:.0f} MiB; queue: {found.submitted} "
            f"submitted, {found.abandoned} abandoned, {found.ended[Outcome.SUCCEEDED]} succeeded"
        )
        wrong += sum(soak.ended.values()) != share or max(soak.seen) > 1 or soak.peak != CAP
        wrong += found.submitted != ended or found.in_flight or found.waiting or soak.queue.open_operations
        wrong += soak.ended["ok"] != found.ended[Outcome.SUCCEEDED] or memory[-1] - memory[1] > 20
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:2])))
