"""The plateau pipeline with the flag off and on: the same outputs, calls, and order of calls.

Flag off runs an item's stages one after the other; with a queue, what does not need one another overlaps. So the order
that must be the same is the one along a plateau: descriptions, features, then the mappings as the catalogues stand.
"""

import asyncio
import time
from collections import Counter, defaultdict

import pytest

from llmq import LLMQueue
from llmq.generators.conversation import SessionContext
from llmq.generators.plateaus import CALLS_PER_SERVICE, PLATEAUS, ServiceItem, plateau_pipeline, plateau_record
from llmq.generators.services import read_catalogues, sample_services
from llmq.providers.simulated import SimulatedProvider
from llmq.providers.spec import ProviderSpec
from llmq.runtime import using
from llmq.virtual import VirtualLoop

LIMITS = [None, 1, 5, 16, 64]
CATALOGUES = read_catalogues()


async def generate(limit, client=None):
    """What comes of 10 services: {what must be equal: its value}."""
    provider = SimulatedProvider(ProviderSpec(latency_seconds=0.01))
    pipeline = plateau_pipeline(provider if client is None else client(provider), CATALOGUES)
    items = [ServiceItem(s, SessionContext(s.service_id, rank=n)) for n, s in enumerate(sample_services())]
    with using(None if limit is None else LLMQueue(limit, telemetry=None)):
        run = pipeline.run(items, open_items=5, ordered=True)
    async with run as outcomes:
        records = [plateau_record(o.item.service, o.unwrap()) async for o in outcomes]
    calls = provider.stats(calls=True)["calls"]
    return {
        "outputs": records,
        "calls": Counter((c["stage"], c["service_id"], c["digest"]) for c in calls),
        "order": _order(calls),
    }


def _order(calls):
    """{(service, plateau): its stages in the order of their calls}."""
    stages = defaultdict(list)
    for call in calls:
        _, _, rest = call["stage"].partition("_")
        for number in rest[:1] or map(str, range(1, len(PLATEAUS) + 1)):
            stages[call["service_id"], number].append(call["stage"])
    return dict(stages)


@pytest.fixture(scope="module")
def flag_off():
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(generate(None))


@pytest.mark.benchmark(group="10 services, 210 calls, virtual time", timer=time.process_time)
@pytest.mark.parametrize("limit", LIMITS, ids=lambda n: "flag off" if n is None else f"queue of {n}")
def test_parity(benchmark, virtual_runner, flag_off, limit):
    found = benchmark.pedantic(lambda: virtual_runner.run(generate(limit)), rounds=1)
    benchmark.extra_info["judged"] = False
    assert sum(found["calls"].values()) == 10 * CALLS_PER_SERVICE
    for what, expected in flag_off.items():
        assert found[what] == expected, what


class _Forgetful:
    """A client that answers one mapping of one service by itself, so that its call is never sent."""

    def __init__(self, provider):
        self._provider = provider
        self._elsewhere = SimulatedProvider(provider.spec)

    async def complete(self, request):
        dropped = (request.stage, request.service_id) == ("mapping_3_data", sample_services()[4].service_id)
        return await (self._elsewhere if dropped else self._provider).complete(request)


def test_a_dropped_mapping_call_is_seen(virtual_runner, flag_off):
    found = virtual_runner.run(generate(16, _Forgetful))
    assert found["outputs"] == flag_off["outputs"], "the answer is the same, only the call is missing"
    assert sum((flag_off["calls"] - found["calls"]).values()) == 1
    assert found["order"] != flag_off["order"]
