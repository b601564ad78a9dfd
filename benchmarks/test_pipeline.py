"""How well a pipeline overlaps: 200 services of 21 calls in virtual time.

`tests/test_pipeline_overlap.py` asserts the bounds; here the exact figures are kept, and the time that pytest-benchmark
sees is what queue and pipeline spend on 4,200 calls.
"""

import math
import random
import time

import anyio
import pytest
from measure import contended, recorded, timed

from llmq import LLMQueue, Pipeline, Stage
from llmq.runtime import using
from llmq.waiters import clock

SERVICES = 200


async def call(service, *_needed):
    await anyio.sleep(next(service))


def seconds_of(service):
    """Service times of its calls: log-normal, 1 s in the middle, the same in every run."""
    draw = random.Random(service)
    while True:
        yield math.exp(draw.gauss(0, 0.25))


def plateaus():
    stages = [Stage("descriptions", call)]
    for number in range(1, 6):
        stages.append(Stage(f"features_{number}", call, ("descriptions",)))
        stages += [Stage(f"mapping_{number}_{n}", call, (f"features_{number}",)) for n in range(3)]
    return Pipeline(stages)


@pytest.mark.benchmark(group="200 services of 21 calls of 1 s, virtual time", timer=time.process_time)
@pytest.mark.parametrize("limit", [8, 64])
def test_overlap(benchmark, virtual_runner, limit):
    async def run():
        queue, began, firsts = LLMQueue(limit, telemetry=None), clock(), []
        with using(queue):
            items = plateaus().run([seconds_of(number) for number in range(SERVICES)], open_items=5)
        async with items as outcomes:
            async for outcome in outcomes:
                outcome.unwrap()
                firsts = firsts or [clock()]
        return queue, began, firsts[0], clock()

    queue, began, first, ended = timed(benchmark, virtual_runner, run, contended(10_000)["asyncio.Semaphore"], rounds=3)
    recorded(benchmark, queue, began, ended, virtual=True)
    benchmark.extra_info.update(makespan=ended - began, first_finished=first - began)
