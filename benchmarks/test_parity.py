"""The plateau pipeline with the flag off and on: the same records and calls; throughput side by side."""

import asyncio
from collections import Counter

import pytest

from llmq import LLMQueue
from llmq.generators.conversation import SessionContext
from llmq.generators.plateaus import ServiceItem, plateau_pipeline, plateau_record
from llmq.generators.services import read_catalogues, sample_services
from llmq.providers.simulated import SimulatedProvider
from llmq.providers.spec import ProviderSpec
from llmq.runtime import using

seen = {}


async def generate(limit):
    provider = SimulatedProvider(ProviderSpec(latency_seconds=0.01))
    pipeline = plateau_pipeline(provider, read_catalogues())
    items = [ServiceItem(s, SessionContext(s.service_id, rank=n)) for n, s in enumerate(sample_services())]
    with using(None if limit is None else LLMQueue(limit, telemetry=None)):
        run = pipeline.run(items, open_items=5)
    async with run as outcomes:
        records = [plateau_record(o.item.service, o.unwrap()) async for o in outcomes]
    calls = Counter((c["stage"], c["service_id"], c["digest"]) for c in provider.stats(calls=True)["calls"])
    return sorted(records, key=lambda r: r["service_id"]), calls


@pytest.mark.benchmark(group="10 services, 210 calls of 10 ms")
@pytest.mark.parametrize("limit", [None, 5, 16, 64], ids=lambda n: "flag off" if n is None else f"queue of {n}")
def test_parity_and_throughput(benchmark, limit):
    with asyncio.Runner() as runner:
        found = benchmark.pedantic(lambda: runner.run(generate(limit)), rounds=3, warmup_rounds=1)
    benchmark.extra_info["calls_per_second"] = 210 / benchmark.stats.stats.mean
    assert found == seen.setdefault("first", found)
