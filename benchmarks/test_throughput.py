"""Goodput by concurrency: exact in virtual time against a limit of 80 calls a second, and for real over HTTP.

In virtual time goodput, percentiles, waits and the 429 share depend on nothing but the code, and the time that
pytest-benchmark sees is what the queue itself spends on some 480 calls.
"""

import asyncio
import itertools
import random
import time

import openai
import pytest
from measure import at_once, contended, recorded, timed

from llmq import LLMQueue, Retry
from llmq.providers.chat import ChatRequest
from llmq.testing import ProviderSpec, SimulatedProvider, serve_provider
from llmq.waiters import clock

WARM_UP, SECONDS = 1.0, 6.0
LIMITED = ProviderSpec(latency_seconds=0.2, requests_per_minute=4800, bucket_seconds=0.5)
REAL_CALLS, REAL_LEVEL = 96, 16


def request(number):
    return ChatRequest("m", [{"role": "user", "content": f"call {number}"}])


async def closed_loop(queue):
    """As many calls at once as the queue has slots, until `SECONDS` after the start."""
    random.seed(7)  # of the back-off
    provider, began = SimulatedProvider(LIMITED), clock()
    run = queue.map(lambda n: provider.complete(request(n)), itertools.count(), retry=Retry(attempts=6))
    async with run as outcomes:
        async for _ in outcomes:
            if clock() - began >= SECONDS:
                break
    return began


@pytest.mark.benchmark(group="closed loop against 80 calls a second, virtual time", timer=time.process_time)
@pytest.mark.parametrize("level", [4, 16, 64])
def test_virtual(benchmark, virtual_runner, level):
    queues = []

    async def run():
        queues.append(LLMQueue(level, telemetry=None))
        return await closed_loop(queues[-1])

    began = timed(benchmark, virtual_runner, run, contended(1000)["asyncio.Semaphore"], rounds=7)
    recorded(benchmark, queues[-1], began + WARM_UP, began + SECONDS, virtual=True)


@pytest.fixture(scope="module")
def provider():
    with serve_provider(latency_seconds=0.05, sigma=0) as found:
        yield found


@pytest.mark.benchmark(group="16 calls at once of 50 ms over HTTP")
def test_over_http(benchmark, runner, provider):
    """Beside the same calls under a semaphore, so that what the client and the machine cost cancels out."""

    async def client():
        return openai.AsyncOpenAI(
            base_url=provider.url, api_key="none", max_retries=0, http_client=openai.DefaultAioHttpClient()
        )

    sdk, numbers, queues = runner.run(client()), itertools.count(), []
    semaphore = asyncio.Semaphore(REAL_LEVEL)

    async def ask():
        message = {"role": "user", "content": f"call {next(numbers)}"}
        await sdk.chat.completions.create(model="m", messages=[message])

    async def under_semaphore():
        async with semaphore:
            await ask()

    async def run():
        queues.append(LLMQueue(REAL_LEVEL, telemetry=None))
        began = clock()
        await at_once(lambda: queues[-1].submit(ask), REAL_CALLS)()
        return began, clock()

    began, ended = timed(
        benchmark, runner, run, at_once(under_semaphore, REAL_CALLS), rounds=3, timer=time.perf_counter
    )
    runner.run(sdk.close())
    recorded(benchmark, queues[-1], began - 1e-9, ended, virtual=False)
