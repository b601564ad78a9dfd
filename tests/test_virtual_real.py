"""What a virtual sweep says is what a real one says: same spec, levels, items, seed, and kind of call. Real time.

Real: the provider in a process of its own, over loopback HTTP. Bounds: goodput within 5 %, 429 share within 2 points,
the same level within max(1, 12 %), the same pace within 2 %, the same that binds. All else must be well below 5 %:

- Transit: a call takes 4 ms longer over HTTP, 10 ms on a busy machine; so it takes 0.4 or 0.6 s, and a refusal 0.1 s.
- Chance: sigma 0.1. With n calls in a window the mean service time is right to 0.1 / sqrt(n): 0.9 % at 4 at once in
  20 s, in which one call more or less is 0.7 %. Virtual windows last a minute, which costs nothing.
- Edges: a level's calls begin together and drift apart by a tenth of a round with each, so after 12 rounds they end at
  any time: what a window holds more or less is a part of one round in 30.
- A limit on calls at once refuses without Retry-After: held for a second each time, calls come in waves of a length
  that a millisecond of transit changes.

Where the busy machine was the limit (a level is marked so, or a call at the lowest level takes 2 % longer than in
virtual time), it says nothing of the provider: then it is all measured once more.
"""

import asyncio

import pytest

import llmq
from llmq.providers.chat import ChatRequest
from llmq.providers.openai_client import OpenAICompatibleClient
from llmq.testing import ProviderSpec, SimulatedProvider, serve_provider

pytestmark = pytest.mark.acceptance

REQUESTS = [ChatRequest("m", [{"role": "user", "content": f"question {n}"}]) for n in range(500)]
CALL = {"latency_seconds": 0.6, "sigma": 0.1, "refusal_seconds": 0.1}
BUSY = 1.02


def asking(client):
    async def ask(request):
        return await client.complete(request)

    return ask


def swept(client, **options):
    options = {"seconds": 20, "seed": 3, "on_progress": lambda _: None, **options}
    return llmq.sweep(asking(client), REQUESTS, **options)


async def over_http(spec, **options):
    with serve_provider(**spec) as server:
        client = OpenAICompatibleClient(server.url)
        try:
            return await swept(client, **options)
        finally:
            await client.aclose()


def measured_for_real(spec, levels, undisturbed):
    """Once more, once, where this machine was the limit. `undisturbed`: service time of the lowest level, seconds."""
    found = asyncio.run(over_http(spec, levels=levels))
    slower = by_level(found)[levels[0]].service_mean / undisturbed
    if slower > BUSY or any(p.limited_by == "client" for p in found.points):
        found = asyncio.run(over_http(spec, levels=levels))
    return found


def by_level(sweep):
    """One point a level, all of its windows pooled."""
    return {p.level: p for p in sweep.judged() if not p.setting.paced}


@pytest.mark.parametrize(
    ("shape", "levels"),
    [
        ({}, [4, 8, 16]),
        ({"latency_seconds": 0.4, "requests_per_minute": 1500, "bucket_seconds": 1}, [4, 8, 16]),
        ({"max_concurrency": 10, "retry_after": "none"}, [4, 8, 16]),
        ({"server_slots": 8}, [4, 8, 16]),
    ],
    ids=["plain latency", "requests a minute", "concurrency limit", "server queueing"],
)
def test_virtual_equals_real(shape, levels):
    spec = {**CALL, **shape}
    virtual = asyncio.run(swept(SimulatedProvider(ProviderSpec(**spec)), levels=levels, virtual=True, seconds=60))
    here = by_level(virtual)
    real = measured_for_real(spec, levels, here[levels[0]].service_mean)
    there = by_level(real)
    for level in levels:
        assert there[level].goodput == pytest.approx(here[level].goodput, rel=0.05), f"at {level}"
        assert there[level].share_429 == pytest.approx(here[level].share_429, abs=0.02), f"at {level}"
    said, heard = virtual.recommend(), real.recommend()
    assert heard.binds == said.binds
    assert abs(heard.level - said.level) <= max(1, 0.12 * said.level), (said, heard)
    assert (heard.requests_per_minute is None) == (said.requests_per_minute is None)
    if said.requests_per_minute is not None:
        assert heard.requests_per_minute == pytest.approx(said.requests_per_minute, rel=0.02)
