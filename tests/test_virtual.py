import asyncio
import time

import pytest

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


def test_what_would_hang_raises_and_names_the_time():
    async def main():
        await asyncio.sleep(7)
        await asyncio.Event().wait()

    with (
        asyncio.Runner(loop_factory=VirtualLoop) as runner,
        pytest.raises(VirtualDeadlock, match=r"virtual 7\.000000 s"),
    ):
        runner.run(main())
