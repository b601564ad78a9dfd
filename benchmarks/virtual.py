"""How long a virtual sweep takes: 7 levels of 2,000 calls, on each of the judge's twelve providers.

python benchmarks/virtual.py     prints a table: the levels alone, and with the windows that the sweep adds
"""

from __future__ import annotations

import asyncio
import time

import judge

import llmq


def seconds_of(ask: object, *, refine: bool) -> float:
    """What a sweep takes in a loop of real time, as a notebook has one."""
    start = time.perf_counter()
    asyncio.run(
        llmq.sweep(
            ask,
            judge.REQUESTS,
            judge.LEVELS,
            virtual=True,
            retry=judge.RETRY,
            refine=refine,
            on_progress=lambda _: None,
        )
    )
    return time.perf_counter() - start


if __name__ == "__main__":
    print("| provider | levels alone | with what it adds |\n|---|---|---|")
    for name, shape in judge.SHAPES.items():
        cells = []
        for refine in (False, True):
            provider, ask = judge.client(shape.spec, seed=1)
            seconds = seconds_of(ask, refine=refine)
            cells.append(f"{seconds:.1f} s, {provider.stats()['requests']:,} calls")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
