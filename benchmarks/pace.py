"""Paced at the provider's own rate, over HTTP: what share the server refuses, and how much of its limit is used.

python benchmarks/pace.py [minutes]     500 requests a minute, bucket 1 s deep, 1 s a call; 5 minutes
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sys
import time
from dataclasses import dataclass

from llmq import LLMQueue, Rate
from llmq.providers.chat import ChatRequest
from llmq.providers.openai_client import OpenAICompatibleClient
from llmq.testing import serve_provider


@dataclass
class Found:
    """What the server saw."""

    requests: int
    refused: int
    seconds: float
    per_minute: float
    share_of_the_limit: float


async def send(url: str, seconds: float, requests_per_minute: int) -> None:
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


def paced(seconds: float, requests_per_minute: int = 500, latency_seconds: float = 1.0) -> Found:
    """Send for so long at the rate that the server lets in, with a bucket one second deep."""
    with serve_provider(
        requests_per_minute=requests_per_minute, bucket_seconds=1.0, latency_seconds=latency_seconds
    ) as provider:
        asyncio.run(send(provider.url, seconds, requests_per_minute))
        stats = provider.stats(calls=True)
    times = [call["started_at"] for call in stats["calls"] if call["status"] == 200]
    length = max(times) - min(times)
    per_minute = (len(times) - 1) / length * 60
    return Found(stats["requests"], stats["refused"], length, per_minute, per_minute / requests_per_minute)


def main(minutes: float = 5.0) -> None:
    """Run it and say what the server saw."""
    found = paced(minutes * 60)
    print(
        f"{found.requests} requests in {found.seconds:.1f} s, {found.refused} refused: "
        f"{found.refused / found.requests:.2%}; {found.per_minute:.1f} a minute: {found.share_of_the_limit:.1%} of the "
        "limit"
    )


if __name__ == "__main__":
    main(*map(float, sys.argv[1:2]))
