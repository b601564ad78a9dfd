"""A process that serves metrics and makes every kind of call, round after round, until its stdin is closed.

The first line it prints is the port. tests/test_receivers.py has Prometheus scrape it.
"""

import asyncio
import contextlib
import functools
import sys

import httpx2

import llmq
from llmq import LLMQueue, LLMTaskMeta, Retry
from llmq.errors import LLMQError, ProviderError
from llmq.telemetry import Telemetry
from llmq.testing import serve_provider

EXPECTED = (ValueError, ConnectionError, TimeoutError, LLMQError, httpx2.HTTPError)


class Calls:
    """Every kind of call."""

    def __init__(self, client):
        self.client = client
        self.queue = LLMQueue(4)
        self.full = LLMQueue(1, max_queued=1, overflow="reject")
        self.hasty = LLMQueue(1, request_timeout=0.05)
        self.numbers = iter(range(10**9))

    async def chat(self, *, stream=False):
        """A request that llmq.AsyncTransport sees."""
        options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        messages = [{"role": "user", "content": f"number {next(self.numbers)}"}]
        response = await self.client.post("chat/completions", json={"model": "m", "messages": messages, **options})
        response.raise_for_status()

    async def fail(self, error):
        raise error

    async def fail_once(self, failed=None):
        """A failure that is tried again after a back-off."""
        failed = [] if failed is None else failed
        if not failed:
            failed.append(1)
            raise ConnectionError("once")

    async def abandoned(self):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.02):
                await self.queue.submit(functools.partial(asyncio.sleep, 5), meta=LLMTaskMeta("cancelled", "m"))

    async def one(self, queue, call, stage, model="m", **options):
        with contextlib.suppress(*EXPECTED):
            await queue.submit(call, meta=LLMTaskMeta(stage, model, "service-1"), **options)

    async def round(self):
        """Some of each."""
        patient, sleep = {"retry": Retry(3, 0.01, 0.05)}, functools.partial(asyncio.sleep, 0.1)
        async with asyncio.TaskGroup() as group:
            for stage in ("features_3", "mapping_3_data", "descriptions") * 3:
                group.create_task(self.one(self.queue, self.chat, stage, **patient))
            group.create_task(self.one(self.queue, functools.partial(self.chat, stream=True), "streamed", **patient))
            group.create_task(self.one(self.queue, functools.partial(self.fail, ValueError("no")), "broken"))
            group.create_task(self.one(self.queue, functools.partial(self.fail_once, []), "flaky", "other", **patient))
            group.create_task(self.one(self.hasty, sleep, "slow"))
            for _ in range(3):
                group.create_task(self.one(self.full, sleep, "full"))
            group.create_task(self.abandoned())


async def stay_stuck():
    """A queue in which a call hangs and another one waits."""
    queue = LLMQueue(1, telemetry=Telemetry("stuck"))
    async with asyncio.TaskGroup() as group:
        for _ in range(2):
            group.create_task(queue.submit(asyncio.Event().wait))


async def main(url):
    """Work until stdin is closed."""
    ends = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    stuck = asyncio.create_task(stay_stuck())
    async with httpx2.AsyncClient(base_url=url, transport=llmq.AsyncTransport(), timeout=30) as client:
        calls = Calls(client)
        refusal = ProviderError("paid up?", status_code=429, body={"error": {"code": "insufficient_quota"}})
        await calls.one(calls.queue, functools.partial(calls.fail, refusal), "features_3", "spent")
        while not ends.done():
            await calls.round()
    stuck.cancel()
    await asyncio.wait([stuck])


if __name__ == "__main__":
    print(llmq.serve_metrics(0), flush=True)
    with serve_provider(
        requests_per_minute=1200, bucket_seconds=0.2, latency_seconds=0.05, answer_tokens=20
    ) as provider:
        asyncio.run(main(provider.url))
