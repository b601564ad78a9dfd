"""What the queue costs a call that does nothing, beside what users would write instead.

One loop for all rounds and batches of calls: `asyncio.run` alone would cost more than what is measured.
"""

import asyncio
import functools

import pytest

import llmq
from llmq import LLMQueue, RuntimeEnv, Settings

BATCH = 1000


@pytest.fixture
def runner():
    with asyncio.Runner() as found:
        yield found
    RuntimeEnv.reset()


async def nothing():
    pass


async def one_after_the_other(call):
    for _ in range(BATCH):
        await call()


async def at_once(call):
    await asyncio.gather(*[call() for _ in range(BATCH)])


def per_call(benchmark, runner, scenario, call):
    benchmark.extra_info["calls_per_round"] = BATCH
    benchmark.pedantic(lambda: runner.run(scenario(call)), rounds=15, warmup_rounds=2)


def plain():
    return nothing


def flag_off():
    RuntimeEnv.initialize(Settings(llm_queue_enabled=False))
    return functools.partial(llmq.submit, nothing)


def queue_submit():
    return functools.partial(LLMQueue(64, telemetry=None).submit, nothing)


def semaphore():
    limit = asyncio.Semaphore(64)

    async def call():
        async with limit:
            await asyncio.sleep(0)

    return call


def queue_slot():
    queue = LLMQueue(64, telemetry=None)

    async def call():
        async with queue.slot():
            await asyncio.sleep(0)

    return call


@pytest.mark.benchmark(group="uncontended")
@pytest.mark.parametrize("make", [plain, flag_off, queue_submit, semaphore, queue_slot], ids=lambda f: f.__name__)
def test_uncontended(benchmark, runner, make):
    per_call(benchmark, runner, one_after_the_other, make())


@pytest.mark.benchmark(group="1,000 waiters on 64 slots")
@pytest.mark.parametrize("make", [semaphore, queue_slot], ids=lambda f: f.__name__)
def test_contended(benchmark, runner, make):
    per_call(benchmark, runner, at_once, make())
