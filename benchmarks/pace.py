"""Paced at the provider's own rate, over HTTP: what share the server refuses, and how much of its limit is used.

python benchmarks/pace.py [minutes]     500 requests a minute, bucket 1 s deep, 1 s a call; 5 minutes
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sys
import time

from llmq import LLMQueue, Rate
from llmq.providers.chat import ChatRequest
from llmq.providers.openai_client import OpenAICompatibleClient
from llmq.testing import serve_provider

REQUESTS_PER_MINUTE = 500


async def pace(url: str, seconds: float, requests_per_minute: int) -> None:
    """Send calls through a queue with that rate, as many as fit."""
    queue = LLMQueue(64, limits=[Rate(requests_per_minute)], telemetry=None)
    client = OpenAICompatibleClient(url)
    ends_at = time.monotonic() + seconds

    async def worker(name: int) -> None:
        number = 0
        while time.monotonic() < ends_at:
            number += 1
            request = ChatRequest("m", [{"role": "user", "content": f"{name}-{number}"}])
            with contextlib.suppress(Exception):  # refusals are counted at the server
                await queue.submit(functools.partial(client.complete, request))

    async with asyncio.TaskGroup() as group:
        for name in range(48):
            group.create_task(worker(name))
    await client.aclose()


def main(minutes: float = 5.0) -> None:
    """Run it and say what the server saw."""
    limit = REQUESTS_PER_MINUTE
    with serve_provider(requests_per_minute=limit, bucket_seconds=1.0, latency_seconds=1.0) as provider:
        asyncio.run(pace(provider.url, minutes * 60, limit))
        stats = provider.stats(calls=True)
    times = [call["started_at"] for call in stats["calls"] if call["status"] == 200]
    per_minute = (len(times) - 1) / (max(times) - min(times)) * 60
    print(
        f"{stats['requests']} requests in {max(times) - min(times):.1f} s, {stats['refused']} refused: "
        f"{stats['refused'] / stats['requests']:.2%}; {per_minute:.1f} a minute: {per_minute / limit:.1%} of the limit"
    )


if __name__ == "__main__":
    main(*map(float, sys.argv[1:2]))
