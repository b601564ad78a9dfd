"""Which HTTP client the OpenAI SDK should ride on: 64 calls at once against a 100 ms server.

Ideal are 640 calls a second. A client that falls behind would be taken for a slow provider.
"""

import asyncio

import httpx2
import openai
import pytest

from llmq.testing import serve_provider

CALLS = 64 * 6


@pytest.fixture(scope="module")
def provider():
    with serve_provider(latency_seconds=0.1, sigma=0) as found:
        yield found


async def ask_all(client):
    left = iter(range(CALLS))

    async def worker():
        for number in left:
            message = [{"role": "user", "content": f"call {number}"}]
            await client.chat.completions.create(model="m", messages=message)

    await asyncio.gather(*[worker() for _ in range(64)])


@pytest.mark.benchmark(group="OpenAI SDK, 64 calls at once of 100 ms")
@pytest.mark.parametrize(
    "transport", [openai.DefaultAioHttpClient, openai.DefaultAsyncHttpx2Client], ids=["aiohttp", "httpx2"]
)
def test_transport(benchmark, provider, transport):
    limits = httpx2.Limits(max_connections=1024, max_keepalive_connections=1024)
    with asyncio.Runner() as runner:

        async def client():
            return openai.AsyncOpenAI(
                base_url=provider.url, api_key="none", max_retries=0, http_client=transport(limits=limits)
            )

        sdk = runner.run(client())
        benchmark.pedantic(lambda: runner.run(ask_all(sdk)), rounds=3, warmup_rounds=1)
        runner.run(sdk.close())
    benchmark.extra_info["calls_per_second"] = CALLS / benchmark.stats.stats.median
    benchmark.extra_info["judged"] = False  # neither is ours
    benchmark.extra_info["ideal_calls_per_second"] = 640
