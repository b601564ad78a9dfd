import functools
from pathlib import Path

import anyio
import pytest

import llmq
from llmq import LLMQueue, Retry, RuntimeEnv, Settings
from llmq.errors import ProviderError, RuntimeInUseError
from llmq.runtime import active_queue, using

pytestmark = pytest.mark.anyio


async def answer(seconds=0.0):
    await anyio.sleep(seconds)
    return "answer"


def on(limit=2, **more):
    return RuntimeEnv.initialize(Settings(llm_queue_enabled=True, llm_queue_concurrency=limit, **more)).llm_queue


async def test_off_by_default_and_then_a_plain_await():
    assert RuntimeEnv.instance().llm_queue is None
    assert active_queue() is None
    assert await llmq.submit(answer) == "answer"
    assert not RuntimeEnv.instance().settings.llm_queue_enabled


async def test_on_by_settings_and_then_through_the_queue():
    queue = on(7, request_timeout=9, queue_timeout=8)
    assert (queue.max_concurrency, queue.request_timeout, queue.queue_timeout) == (7, 9, 8)
    assert await llmq.submit(answer, meta=llmq.LLMTaskMeta("stage")) == "answer"
    assert [o.stage for o in queue.records().operations] == ["stage"]


async def test_on_by_environment(monkeypatch):
    monkeypatch.setenv("SA_LLM_QUEUE_ENABLED", "1")
    assert RuntimeEnv.instance().llm_queue.max_concurrency == 3


async def test_on_by_yaml():
    Path("config").mkdir()
    Path("config/app.yaml").write_text("llm_queue_enabled: true\nllm_queue_concurrency: 4\n")
    assert RuntimeEnv.instance().llm_queue.max_concurrency == 4


async def test_initialize_twice_with_the_same_and_with_others():
    first = RuntimeEnv.initialize(Settings(concurrency=4))
    assert RuntimeEnv.initialize(Settings(concurrency=4)) is first
    with pytest.raises(RuntimeInUseError, match=r"concurrency=4 is not 5.*reset"):
        RuntimeEnv.initialize(Settings(concurrency=5))
    RuntimeEnv.reset()
    assert RuntimeEnv.initialize(Settings(concurrency=5)).settings.concurrency == 5


async def test_the_source_of_a_setting_is_no_difference(monkeypatch):
    RuntimeEnv.initialize(Settings(concurrency=4))
    monkeypatch.setenv("SA_CONCURRENCY", "4")
    RuntimeEnv.initialize(Settings())


async def test_reset_is_refused_while_calls_are_open():
    on(1)
    async with anyio.create_task_group() as group:
        group.start_soon(functools.partial(llmq.submit, functools.partial(answer, 5)))
        await anyio.sleep(1)
        with pytest.raises(RuntimeInUseError, match="1 calls are open"):
            RuntimeEnv.reset()
    RuntimeEnv.reset()


@pytest.mark.parametrize("enabled", [False, True])
async def test_retry_works_the_same_in_both_modes(enabled):
    if enabled:
        on()
    calls = []

    async def fails_twice():
        calls.append(1)
        if len(calls) < 3:
            raise ProviderError("no", status_code=500)
        return "answer"

    assert await llmq.submit(fails_twice, retry=Retry(3, base=0.5)) == "answer"
    assert len(calls) == 3


async def peak_of(limit, count):
    now = peak = 0

    async def block():
        nonlocal now, peak
        async with limit:
            now += 1
            peak = max(peak, now)
            await anyio.sleep(1)
            now -= 1

    async with anyio.create_task_group() as group:
        for _ in range(count):
            group.start_soon(block)
    return peak


async def test_a_limiter_bounds_while_the_queue_is_off_and_steps_aside_while_it_is_on():
    limit = llmq.limiter(2)
    assert await peak_of(limit, 6) == 2
    RuntimeEnv.reset()
    on(8)
    assert await peak_of(limit, 6) == 6


async def test_no_double_gating_queue_8_limiter_2_gives_8_in_flight():
    queue, limit = on(8), llmq.limiter(2)

    async def block():
        async with limit:
            await llmq.submit(functools.partial(answer, 1))

    async with anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(block)
        await anyio.sleep(0.5)
        assert queue.statistics().in_flight == 8


async def test_a_limiter_that_sees_the_flag_change_loses_nothing():
    limit = llmq.limiter(1)
    async with limit:
        RuntimeEnv.reset()
        on(4)
        async with limit:
            pass
        RuntimeEnv.reset()
    on(4)
    async with limit:
        RuntimeEnv.reset()
    assert await peak_of(limit, 3) == 1


async def test_a_limiter_ends_with_an_error_too():
    limit = llmq.limiter(1)
    with pytest.raises(KeyError):
        async with limit:
            raise KeyError
    assert await peak_of(limit, 2) == 1


async def test_a_chosen_queue_goes_before_the_process_one_also_in_tasks():
    mine = LLMQueue(1, telemetry=None)
    theirs = on()
    with using(mine):
        async with anyio.create_task_group() as group:
            group.start_soon(llmq.submit, answer)
    with using(None):
        await llmq.submit(answer)
    assert len(mine.records().operations) == 1
    assert len(theirs.records().operations) == 0
