"""500 calls recorded at one level over HTTP, against what is measured at five others. Real time, loopback."""

import asyncio
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress

import openai
import pytest

import llmq
from llmq import LLMQueue, LLMTaskMeta, Retry
from llmq.testing import serve_provider
from llmq.tune.point import Setting, Window, measure
from llmq.tune.trace import Trace, write_trace
from llmq.tune.whatif import what_if

pytestmark = [pytest.mark.anyio, pytest.mark.acceptance]
CALLS = 500
ATTEMPTS = 2000
WARM_UP_SECONDS = 1.2
RETRY = Retry()


@pytest.fixture
def anyio_backend():
    return "asyncio"


class Asking:
    """A wrapped client that asks something new each time."""

    def __init__(self, url):
        self._client = llmq.wrap(openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0))
        self._count = 0

    async def __call__(self, _=None):
        self._count += 1
        message = [{"role": "user", "content": f"question {self._count}"}]
        return await self._client.chat.completions.create(model="gpt-4o", messages=message)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        await self._client.close()


async def record(ask, level):
    """The trace of a queue that is never empty; by way of a file."""
    queue = LLMQueue(level, telemetry=None)
    left = iter(range(CALLS))

    async def work():
        for _ in left:
            with suppress(openai.RateLimitError):
                await queue.submit(ask, meta=LLMTaskMeta("s"), retry=RETRY)

    await asyncio.gather(*(work() for _ in range(2 * level)))
    write_trace("trace.jsonl", queue.records(), level=level)
    return Trace.read("trace.jsonl")


async def measured(ask, levels, seconds):
    """Points by level, the highest first, so that a bucket that the recording has emptied stays so where it matters.

    Where this client was the limit, once more: such a window says nothing about the provider.
    """
    found = {}
    for level in sorted(levels, reverse=True):
        found[level] = await steady(ask, level, seconds)
        if found[level].limited_by == "client":
            print(f"{level}: this client was the limit, with {found[level].cpu_share:.0%} CPU; measured again")
            found[level] = await steady(ask, level, seconds)
    return found


async def steady(ask, level, seconds):
    """What a queue that is never empty does once it is warm: for so long, and where it is refused for 2,000 attempts.

    What still runs at the end is waited for, so that a server that queues is idle when the next level begins.
    """
    queue, stopped = LLMQueue(level, telemetry=None), asyncio.Event()

    async def work():
        while not stopped.is_set():
            with suppress(openai.RateLimitError):
                await queue.submit(ask, meta=LLMTaskMeta("s"), retry=RETRY)

    def refused():
        return any(a.outcome == "rejected" for a in queue.records().attempts)

    tasks = [asyncio.create_task(work()) for _ in range(2 * level)]
    await asyncio.sleep(WARM_UP_SECONDS)
    start, cpu, before = time.monotonic(), time.process_time(), len(queue.records().attempts)
    await asyncio.sleep(seconds)
    while refused() and len(queue.records().attempts) < before + ATTEMPTS:
        await asyncio.sleep(0.1)
    end = time.monotonic()
    share = (time.process_time() - cpu) / (end - start)
    stopped.set()
    await asyncio.gather(*tasks)
    return measure(Setting(level), queue.records(), whole_rounds(queue.records(), level, start, end, share))


def whole_rounds(records, level, start, end, share):
    """The window from a success to one a whole number of rounds later: calls of equal length end all at once, so that
    edges at any moment would be off by a round."""
    ends = [a.ended_at for a in records.attempts if a.outcome == "ok" and start < a.ended_at <= end]
    calls = (len(ends) - 1) // level * level
    return Window(ends[0], ends[calls], WARM_UP_SECONDS, share)


def assert_close(found, truth):
    """Goodput within 5 %, 429 share within 2 points, at each level."""
    print(found)
    predicted = {point.level: point for point in found.judged()}
    for level, real in truth.items():
        point = predicted[level]
        print(
            f"{level}: {point.goodput:.2f}/s, 429 {point.share_429:.3f}; measured {real.goodput:.2f}/s "
            f"({point.goodput / real.goodput - 1:+.1%}), {real.share_429:.3f} of {real.attempts}, {real.limited_by}"
        )
    assert predicted.keys() == truth.keys()
    for level, real in truth.items():
        assert real.limited_by != "client", "this machine is too busy to measure a provider"
        assert predicted[level].goodput == pytest.approx(real.goodput, rel=0.05), level
        assert predicted[level].share_429 == pytest.approx(real.share_429, abs=0.02), level


SHAPES = {
    "latency": ({"latency_seconds": 0.25}, 24, [4, 6, 8, 12, 16]),
    "requests": (
        {"latency_seconds": 0.3, "requests_per_minute": 3000, "bucket_seconds": 0.5}, 20, [4, 8, 11, 18, 24],
    ),
    "concurrency": ({"latency_seconds": 0.25, "max_concurrency": 12}, 16, [4, 6, 8, 10, 12]),
    "queueing": ({"latency_seconds": 0.4, "server_slots": 16}, 24, [8, 10, 12, 20, 28]),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
async def test_what_if_agrees_with_what_is_measured_over_http(shape):
    spec, level, others = SHAPES[shape]
    with serve_provider(sigma=0.1, **spec) as server:
        async with Asking(server.url) as ask:
            trace = await record(ask, level)
            truth = await measured(ask, others, 5.0)
    found = await what_if(trace, others, refine=False, calls=1500)
    assert_close(found, truth)
    assert found.unknown_levels == ()
    assert os.path.getsize("trace.jsonl") < 150_000


@contextmanager
def llmock(*options):
    """In a process of its own, see test_llmock.py."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        root = f"http://127.0.0.1:{free.getsockname()[1]}"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("LLMOCK_", "PYTHONPATH"))}
    serve = [sys.executable, "-m", "llmock.cli", "serve", "--port", root.rsplit(":", 1)[1], "--log-level", "warning"]
    process = subprocess.Popen([*serve, *options], stdout=subprocess.DEVNULL, env=clean)
    try:
        for _ in range(600):
            assert process.poll() is None
            try:
                urllib.request.urlopen(f"{root}/health", timeout=60).close()
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        yield f"{root}/v1"
    finally:
        process.terminate()
        process.communicate()


async def test_what_if_agrees_with_what_is_measured_on_llmock():
    """Its limit is only told in headers: 500 calls do not reach it. So a level above the recorded one is known."""
    levels = [4, 6, 8, 12, 20]
    with llmock("--rpm", "12000", "--latency-ms", "300") as url:
        async with Asking(url) as ask:
            trace = await record(ask, 16)
            found = await what_if(trace, levels, refine=False, calls=1500)
            assert_close(found, await measured(ask, levels, 5.0))
    (rate,) = [rate for rate in found.model.rates if rate.kind == "requests"]
    assert (rate.source, rate.per_minute) == ("told", pytest.approx(12000))
    (limited,) = (await what_if(trace, [16], requests_per_minute=1200, refine=False)).judged()
    assert limited.goodput == pytest.approx(20, rel=0.03)
