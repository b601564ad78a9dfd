"""How well a pipeline fills its slots, and how soon the first service is there: 200 services, virtual time.

No order of calls can end before all work is spread over all slots, nor before the longest chain of one service.
"""

import math
import random

import anyio
import pytest

from llmq import LLMQueue, Pipeline, Stage
from llmq.runtime import using

pytestmark = pytest.mark.anyio

SERVICES, PLATEAUS, MAPPINGS = 200, 5, 3


def service_seconds(number):
    """{stage: seconds} of one service: log-normal, about 1 s."""
    draw = random.Random(number)
    names = ["descriptions"]
    for plateau in range(PLATEAUS):
        names += [f"features_{plateau}", *(f"mapping_{plateau}_{n}" for n in range(MAPPINGS))]
    return {name: math.exp(draw.gauss(0, 0.25)) for name in names}


def critical_path(seconds):
    """Of one service: descriptions, then the slowest plateau."""
    chains = [
        seconds[f"features_{p}"] + max(seconds[f"mapping_{p}_{n}"] for n in range(MAPPINGS)) for p in range(PLATEAUS)
    ]
    return seconds["descriptions"] + max(chains)


def plateaus():
    def stage(name, *after):
        async def call(seconds, *_needed):
            await anyio.sleep(seconds[name])

        return Stage(name, call, after)

    stages = [stage("descriptions")]
    for plateau in range(PLATEAUS):
        stages.append(stage(f"features_{plateau}", "descriptions"))
        stages += [stage(f"mapping_{plateau}_{n}", f"features_{plateau}") for n in range(MAPPINGS)]
    return Pipeline(stages)


async def run(cap, services):
    """Makespan, and index and time of the first finished service."""
    with using(LLMQueue(cap, telemetry=None)):
        items = plateaus().run(services, open_items=5)
    began, first = anyio.current_time(), None
    async with items as outcomes:
        async for outcome in outcomes:
            outcome.unwrap()
            first = first or (outcome.index, anyio.current_time() - began)
    return anyio.current_time() - began, *first


@pytest.mark.parametrize("cap", [1, 4, 16, 64])
async def test_200_services_fill_their_slots_and_the_first_is_early(cap):
    services = [service_seconds(number) for number in range(SERVICES)]
    makespan, index, first = await run(cap, services)
    work = sum(sum(each.values()) for each in services)
    assert makespan <= 1.05 * max(work / cap, max(map(critical_path, services)))
    share_of_the_queue = sum(services[index].values()) / cap
    assert first <= 1.5 * critical_path(services[index]) + share_of_the_queue
