import asyncio
import threading
import time

import aiohttp
import anyio
import anyio.to_thread
import openai
import pytest

from llmq.errors import VirtualTimeError
from llmq.testing import in_virtual_time
from llmq.virtual import VirtualDeadlock, VirtualLoop


def test_an_hour_takes_a_moment_and_is_an_hour():
    async def main():
        loop = asyncio.get_running_loop()
        order = []

        async def sleeper(seconds):
            await asyncio.sleep(seconds)
            order.append((seconds, loop.time()))

        await asyncio.gather(sleeper(3600), sleeper(1), sleeper(60))
        return order

    started = time.monotonic()
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        assert runner.run(main()) == [(1, 1.0), (60, 60.0), (3600, 3600.0)]
    assert time.monotonic() - started < 60


def test_from_a_loop_that_runs_already():
    """As in a notebook's cell. An error comes through as it is."""
    loops = []

    async def nap():
        await asyncio.sleep(3600)
        loops.append(asyncio.get_running_loop())
        return loops[-1].time()

    async def broken():
        raise KeyError("x")

    async def cell():
        loops.append(asyncio.get_running_loop())
        with pytest.raises(KeyError, match="x"):
            await in_virtual_time(broken)
        return await in_virtual_time(nap)

    assert asyncio.run(cell()) == 3600.0
    assert isinstance(loops[1], VirtualLoop)
    assert not isinstance(loops[0], VirtualLoop)


@pytest.mark.parametrize("many", [1, 40])
def test_cancelled_from_a_loop_that_runs_the_work_has_ended(many):
    """More of them than an executor has workers. A second cancellation does not cut the clean-up of the first short."""
    begun, cleaned = threading.Semaphore(0), []

    async def busy():
        begun.release()
        try:
            while True:
                await asyncio.sleep(1)
        finally:
            await asyncio.sleep(3600)
            cleaned.append(True)

    async def cell():
        tasks = [asyncio.create_task(in_virtual_time(busy())) for _ in range(many)]
        await asyncio.sleep(0)
        assert all(begun.acquire(timeout=30) for _ in tasks)
        for task in tasks:
            task.cancel()
        async with asyncio.timeout(30):
            found = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(each) for each in found} == {asyncio.CancelledError}
        assert len(cleaned) == many

    asyncio.run(cell())


def test_on_a_virtual_clock_already_it_is_just_awaited():
    async def nap():
        await asyncio.sleep(60)
        return asyncio.get_running_loop()

    async def main():
        return await in_virtual_time(nap) is asyncio.get_running_loop()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        assert runner.run(main())


def test_work_that_is_cancelled_from_within_is_a_cancellation():
    async def cancels_itself():
        asyncio.current_task().cancel()
        await asyncio.sleep(1)

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(in_virtual_time(cancels_itself))


@pytest.mark.parametrize("work", [None, 3])
def test_what_is_no_work_is_refused(work):
    with pytest.raises(TypeError, match=f"a coroutine, .* or an async function, .*; got {work}"):
        asyncio.run(in_virtual_time(work))


def test_what_would_hang_raises_and_names_the_time():
    async def main():
        await asyncio.sleep(7)
        await asyncio.Event().wait()

    with (
        asyncio.Runner(loop_factory=VirtualLoop) as runner,
        pytest.raises(VirtualDeadlock, match=r"virtual 7\.000000 s"),
    ):
        runner.run(main())


async def ask_aiohttp():
    async with aiohttp.ClientSession() as session, session.get("http://127.0.0.1:9/"):
        pass


async def ask_aiohttp_by_name():
    async with aiohttp.ClientSession() as session, session.get("http://localhost:9/"):
        pass


async def ask_openai():
    async with openai.AsyncOpenAI(base_url="http://127.0.0.1:9/v1", api_key="none", max_retries=0) as client:
        await client.models.list()


async def ask_a_thread():
    await asyncio.to_thread(time.monotonic)


async def ask_a_process():
    await asyncio.create_subprocess_exec("true")


async def be_a_server():
    await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)


@pytest.mark.parametrize(
    ("main", "asked_for"),
    [
        (ask_aiohttp, "a socket"),
        (ask_aiohttp_by_name, "a name look-up"),
        (ask_openai, "a worker thread"),
        (ask_a_thread, "a worker thread"),
        (ask_a_process, "a process or pipe"),
        (be_a_server, "a socket"),
    ],
)
def test_what_runs_in_real_time_is_refused_where_it_is_asked_for(main, asked_for):
    async def caught():
        with pytest.raises(VirtualTimeError, match=rf"{asked_for} \(\w+\).*llmq\.testing\.SimulatedProvider"):
            await main()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(caught())


@pytest.mark.parametrize("busy", [False, True])
def test_a_worker_thread_of_anyio_ends_the_run(busy):
    """Whether the clock would jump past it, or nothing else is there to do."""
    let_go = threading.Event()

    async def main():
        async with anyio.create_task_group() as group:
            if busy:
                group.start_soon(anyio.sleep, 3600)
            try:
                await anyio.to_thread.run_sync(let_go.wait)
            finally:
                let_go.set()

    with (
        asyncio.Runner(loop_factory=VirtualLoop) as runner,
        pytest.raises(VirtualTimeError, match=r"anyio\.to_thread\.run_sync"),
    ):
        runner.run(main())


def test_a_thread_may_wake_a_task_but_is_not_waited_for():
    async def main():
        woken = asyncio.Event()
        loop = asyncio.get_running_loop()
        thread = threading.Thread(target=loop.call_soon_threadsafe, args=(woken.set,))
        thread.start()
        thread.join()
        await woken.wait()
        await asyncio.sleep(5)
        return loop.time()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        assert runner.run(main()) == 5
