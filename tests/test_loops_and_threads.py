"""One queue over several event loops, repeated runs, trio and threads. Real time, generous bounds."""

import asyncio
import contextlib
import functools
import gc
import random
import runpy
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anyio
import pytest
import trio

from llmq import Cap, LLMQueue, LLMTaskMeta, Outcome, Rate, Retry
from llmq.core import Scheduler
from llmq.errors import ProviderError, QueueTimeout

PATIENCE = 30


class Gauge:
    """How many are inside at once, over all threads; the most is `peak`."""

    def __init__(self):
        self.lock = threading.Lock()
        self.now = self.peak = self.total = 0

    def __enter__(self):
        with self.lock:
            self.now += 1
            self.total += 1
            self.peak = max(self.peak, self.now)

    def __exit__(self, *exc):
        with self.lock:
            self.now -= 1


def assert_idle(queue):
    queue._scheduler.check()
    assert (queue.statistics().in_flight, queue.statistics().waiting, queue.open_operations) == (0, 0, 0)


async def many(queue, gauge, count):
    async def call():
        with gauge:
            await anyio.sleep(0.002)

    async with anyio.create_task_group() as group:
        for _ in range(count):
            group.start_soon(queue.submit, call)


def test_run_after_run_contended_each_time():
    queue, gauge = LLMQueue(2, telemetry=None), Gauge()
    for _ in range(3):
        asyncio.run(many(queue, gauge, 20))
    assert (gauge.total, gauge.peak) == (60, 2)
    assert_idle(queue)


def test_loops_trio_and_threads_at_once_under_one_cap():
    queue, gauge = LLMQueue(3, telemetry=None), Gauge()
    barrier = threading.Barrier(6)

    def in_asyncio():
        barrier.wait(PATIENCE)
        asyncio.run(many(queue, gauge, 60))

    def in_trio():
        barrier.wait(PATIENCE)
        trio.run(many, queue, gauge, 60)

    def blocking():
        barrier.wait(PATIENCE)

        def call(number):
            with gauge:
                threading.Event().wait(0.002)
                return number

        return [queue.submit_sync(call, number) for number in range(30)]

    with ThreadPoolExecutor(6) as pool:
        futures = [pool.submit(f) for f in (in_asyncio, in_asyncio, in_trio, in_trio, blocking, blocking)]
        results = [future.result(PATIENCE) for future in futures]
    assert results[4] == list(range(30))
    assert gauge.total == 4 * 60 + 2 * 30
    assert gauge.peak == 3
    assert_idle(queue)


def test_a_slot_taken_in_one_thread_is_ended_in_another():
    queue = LLMQueue(1, telemetry=None)

    async def take():
        return await queue.slot().__aenter__()

    slot = asyncio.run(take())
    assert queue.statistics().in_flight == 1
    waited = []
    waiting = threading.Thread(target=lambda: waited.append(queue.submit_sync(lambda: "ran")))
    waiting.start()
    releasing = threading.Thread(target=slot.release)
    releasing.start()
    waiting.join(PATIENCE)
    releasing.join(PATIENCE)
    assert waited == ["ran"]
    assert_idle(queue)


class GuardedLoop(asyncio.SelectorEventLoop):
    """Counts the calls from other threads that are not safe from there: the loop may sleep through them."""

    def __init__(self):
        self.thread, self.unsafe_calls = threading.get_ident(), 0
        super().__init__()

    def call_soon(self, callback, *args, context=None):
        self.unsafe_calls += threading.get_ident() != self.thread
        return super().call_soon(callback, *args, context=context)


def test_a_loop_is_woken_from_another_thread_in_the_thread_safe_way():
    queue, loop = LLMQueue(1, telemetry=None), GuardedLoop()
    slot = asyncio.run(queue.slot().__aenter__())
    task = loop.create_task(queue.submit(functools.partial(asyncio.sleep, 0, "ran")))
    loop.run_until_complete(asyncio.sleep(0))
    releasing = threading.Thread(target=slot.release)
    releasing.start()
    releasing.join(PATIENCE)
    assert loop.run_until_complete(task) == "ran"
    loop.close()
    assert loop.unsafe_calls == 0
    assert_idle(queue)


def test_a_closed_loop_gives_its_slots_back_to_the_next_caller_who_waits():
    queue = LLMQueue(1, telemetry=None)
    loop = asyncio.new_event_loop()

    async def hold_for_ever():
        await asyncio.sleep(PATIENCE)

    kept = loop.create_task(queue.submit(hold_for_ever))
    loop.run_until_complete(asyncio.sleep(0))
    assert queue.statistics().in_flight == 1
    loop.close()  # with the task still in it, which `kept` keeps from being collected

    async def call():
        return "ran"

    async def patiently():
        async with asyncio.timeout(PATIENCE):
            return await queue.submit(call)

    assert asyncio.run(patiently()) == "ran"
    kept._log_destroy_pending = False
    kept.get_coro().close()  # its late end changes nothing
    assert_idle(queue)


def test_a_closed_loop_gives_its_places_in_the_queue_back():
    queue = LLMQueue(1, telemetry=None)
    loop = asyncio.new_event_loop()
    slot = asyncio.run(queue.slot().__aenter__())
    kept = [loop.create_task(queue.submit(functools.partial(asyncio.sleep, 0))) for _ in range(3)]
    loop.run_until_complete(asyncio.sleep(0))
    assert queue.statistics().waiting == 3
    loop.close()
    slot.release()  # wakes a waiter that is gone, and the next, and the next
    for task in kept:
        task._log_destroy_pending = False
        task.get_coro().close()
    assert_idle(queue)
    assert queue.statistics().abandoned == 3


def test_a_slot_meant_for_a_closed_loop_goes_to_the_next_caller():
    queue = LLMQueue(1, telemetry=None)
    loop = asyncio.new_event_loop()
    slot = asyncio.run(queue.slot().__aenter__())
    kept = loop.create_task(queue.slot().__aenter__())
    loop.run_until_complete(asyncio.sleep(0))
    assert queue.statistics().waiting == 1
    loop.close()
    slot.release()
    assert (queue.statistics().in_flight, queue.statistics().abandoned) == (0, 1)
    kept._log_destroy_pending = False
    kept.get_coro().close()
    assert_idle(queue)


def test_a_collected_task_gives_its_slot_back():
    queue = LLMQueue(1, telemetry=None)
    loop = asyncio.new_event_loop()
    task = loop.create_task(queue.submit(functools.partial(asyncio.sleep, PATIENCE)))
    loop.run_until_complete(asyncio.sleep(0))
    assert queue.statistics().in_flight == 1
    task._log_destroy_pending = False
    loop.close()
    del task, loop
    gc.collect()
    assert_idle(queue)


def test_a_thread_gives_up_after_the_queue_timeout():
    queue = LLMQueue(1, queue_timeout=0.05, telemetry=None)
    asyncio.run(queue.slot().__aenter__())  # collected at once, so take one that stays
    slot = asyncio.run(queue.slot().__aenter__())
    with pytest.raises(QueueTimeout, match=r"queue_timeout=0.05 s"):
        queue.submit_sync(print)
    slot.release()
    assert queue.submit_sync(str.upper, "ran") == "RAN"
    with pytest.raises(ZeroDivisionError):
        queue.submit_sync(lambda: 1 / 0)
    assert [o.outcome for o in queue.records().operations] == ["cancelled", "timeout", "ok", "ok", "error"]
    assert_idle(queue)


def test_drain_from_another_loop_waits_for_all_of_them():
    queue, gauge = LLMQueue(2, telemetry=None), Gauge()
    started = threading.Event()

    def work():
        async def main():
            started.set()
            await many(queue, gauge, 50)

        asyncio.run(main())

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(work)
        assert started.wait(PATIENCE)
        while not queue.open_operations and not done.done():
            threading.Event().wait(0.001)
        try:
            trio.run(queue.drain, PATIENCE)
        finally:
            queue.resume()
        assert queue.open_operations in range(51)
        done.result(PATIENCE)
    assert_idle(queue)


def test_random_cancellations_over_four_threads_lose_nothing():
    queue, gauge = LLMQueue(4, telemetry=None), Gauge()

    def in_loop(seed):
        async def one(number):
            async def call():
                with gauge:
                    await asyncio.sleep(0.0005 * (number % 4))

            try:
                async with asyncio.timeout(0.0007 * (number % 9 + 1)):
                    await queue.submit(call)
            except TimeoutError:
                pass

        async def main():
            await asyncio.gather(*[one(seed + number) for number in range(300)])

        asyncio.run(main())

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(in_loop, seed) for seed in range(4)]:
            future.result(PATIENCE)
    assert gauge.peak <= 4
    assert_idle(queue)
    outcomes = [o.outcome for o in queue.records().operations]
    assert len(outcomes) == 1200
    assert set(outcomes) <= {"ok", "cancelled"}


def test_reading_statistics_from_another_thread_loses_no_wake_up():
    queue, stop = LLMQueue(2, telemetry=None), threading.Event()

    def dashboard():
        while not stop.is_set():
            queue.statistics()

    async def main():
        async def one():
            for _ in range(200):
                await queue.submit(functools.partial(asyncio.sleep, 0))

        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*[one() for _ in range(10)])

    with ThreadPoolExecutor(2) as pool:
        watching = [pool.submit(dashboard) for _ in range(2)]
        try:
            asyncio.run(main())
        finally:
            stop.set()
        for future in watching:
            future.result(PATIENCE)
    assert_idle(queue)


def held_by_a_loop(queue, factory, **options):
    """A loop with a task that holds the queue's slot, and the task."""
    loop = asyncio.new_event_loop()
    task = loop.create_task(queue.submit(factory, **options))
    loop.run_until_complete(asyncio.sleep(0))
    return loop, task


def ends_late(task):
    """The end of a task whose loop is closed: it must change nothing any more."""
    task._log_destroy_pending = False
    task.get_coro().close()


def test_a_loop_that_dies_while_others_wait_gives_its_slot_to_them():
    queue = LLMQueue(1, telemetry=None)
    loop, kept = held_by_a_loop(queue, functools.partial(asyncio.sleep, PATIENCE))

    async def main():
        waiting = asyncio.create_task(queue.submit(functools.partial(asyncio.sleep, 0, "ran")))
        await asyncio.sleep(0)
        loop.close()
        async with asyncio.timeout(PATIENCE):
            await queue.submit(functools.partial(asyncio.sleep, 0))  # notices
            return await waiting

    assert asyncio.run(main()) == "ran"
    ends_late(kept)
    assert_idle(queue)


def test_a_dead_loop_is_noticed_though_nobody_waits():
    queue = LLMQueue(2, telemetry=None)
    loop, kept = held_by_a_loop(queue, functools.partial(asyncio.sleep, PATIENCE))
    loop.close()
    asyncio.run(queue.submit(functools.partial(asyncio.sleep, 0)))
    assert queue.statistics().in_flight == 0
    ends_late(kept)
    assert_idle(queue)


def test_a_thread_notices_a_dead_loop_too():
    queue = LLMQueue(1, telemetry=None, queue_timeout=PATIENCE)
    loop, kept = held_by_a_loop(queue, functools.partial(asyncio.sleep, PATIENCE))
    loop.close()
    assert queue.submit_sync(str.upper, "ran") == "RAN"
    ends_late(kept)
    assert_idle(queue)


def test_a_loop_that_dies_in_a_back_off_leaves_nothing_open():
    queue = LLMQueue(1, telemetry=None)

    async def refused():
        raise ProviderError("", status_code=500)

    loop, kept = held_by_a_loop(queue, refused, retry=Retry(2, base=1000, cap=1000))
    assert queue.open_operations == 1
    loop.close()

    async def main():
        async with asyncio.timeout(PATIENCE):
            await queue.submit(functools.partial(asyncio.sleep, 0))

    asyncio.run(main())
    ends_late(kept)
    assert_idle(queue)


def test_the_timer_does_not_end_with_the_loop_that_first_needed_it():
    queue = LLMQueue(10, limits=[Rate(20, per="second")], telemetry=None, queue_timeout=5)
    asyncio.run(queue.submit(functools.partial(asyncio.sleep, 0)))
    loop, kept = held_by_a_loop(queue, functools.partial(asyncio.sleep, 0))
    assert queue.statistics().waiting == 1
    loop.close()
    assert asyncio.run(queue.submit(functools.partial(asyncio.sleep, 0, "ran"))) == "ran"
    ends_late(kept)
    assert queue.submit_sync(str.upper, "in a thread too") == "IN A THREAD TOO"
    assert_idle(queue)


def test_a_thread_settles_its_tokens():
    queue = LLMQueue(10, limits=[Rate(600, of="tokens")], telemetry=None, queue_timeout=0.05)
    assert queue.submit_sync(lambda: {"usage": {"total_tokens": 100_000}}, meta=LLMTaskMeta(tokens=0))
    with pytest.raises(QueueTimeout, match="tokens per minute"):
        queue.submit_sync(print, meta=LLMTaskMeta(tokens=1))
    assert_idle(queue)


def test_who_waits_outside_of_any_loop_leaves_nothing_behind():
    queue = LLMQueue(1, telemetry=None)
    slot = asyncio.run(queue.slot().__aenter__())
    for waiting in (queue.submit(functools.partial(asyncio.sleep, 0)), queue.slot().__aenter__()):
        with pytest.raises(RuntimeError, match="no asyncio or trio event loop runs here"):
            waiting.send(None)
        assert queue.statistics().waiting == 0
    slot.release()
    assert_idle(queue)


def test_a_slot_in_use_is_not_taken_from_its_holder_when_the_loop_of_its_birth_closes():
    queue = LLMQueue(1, telemetry=None, queue_timeout=0.2)
    loop = asyncio.new_event_loop()
    slot = loop.run_until_complete(queue.slot().__aenter__())
    loop.close()
    with pytest.raises(QueueTimeout):
        asyncio.run(queue.submit(functools.partial(asyncio.sleep, 0)))
    slot.release()
    assert_idle(queue)


def test_a_thread_is_woken_by_a_collection():
    queue = LLMQueue(1, telemetry=None, queue_timeout=PATIENCE)
    slot = asyncio.run(queue.slot().__aenter__())
    cycle = [slot]
    cycle.append(cycle)
    del slot, cycle
    timer = threading.Timer(0.05, gc.collect)
    timer.start()
    assert queue.submit_sync(str.upper, "ran") == "RAN"
    timer.join()
    assert_idle(queue)


def test_a_rate_is_kept_over_loops_trio_and_threads_at_once():
    queue, lock, times = LLMQueue(50, limits=[Rate(1800)], telemetry=None), threading.Lock(), []

    def note():
        with lock:
            times.append(time.monotonic())

    async def call():
        note()

    async def eight():
        async with anyio.create_task_group() as group:
            for _ in range(8):
                group.start_soon(queue.submit, call)

    with ThreadPoolExecutor(12) as pool:
        futures = [pool.submit(asyncio.run, eight()) for _ in range(2)] + [pool.submit(trio.run, eight)]
        futures += [pool.submit(queue.submit_sync, note) for _ in range(8)]
        for future in futures:
            future.result(PATIENCE)
    assert len(times) == 32
    assert max(times) - min(times) >= 31 / 30 - 0.05
    assert_idle(queue)


@pytest.mark.parametrize("ends", ["returns", "dies"])
def test_time_goes_on_for_others_when_the_loop_that_waited_first_ends(ends):
    queue = LLMQueue(50, limits=[Rate(120)], telemetry=None)
    asyncio.run(queue.submit(functools.partial(asyncio.sleep, 0)))
    loop = asyncio.new_event_loop()
    first = loop.create_task(queue.submit(functools.partial(asyncio.sleep, 0)))
    loop.run_until_complete(asyncio.sleep(0))
    assert queue.statistics().waiting == 1

    async def wait_too():
        async with asyncio.timeout(PATIENCE):
            await queue.submit(functools.partial(asyncio.sleep, 0))

    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(asyncio.run, wait_too())
        while queue.statistics().waiting < 2:
            time.sleep(0.001)
        if ends == "returns":
            first.cancel()
            loop.run_until_complete(asyncio.wait([first]))
        loop.close()
        second.result(PATIENCE)
    if ends == "dies":
        ends_late(first)
    assert_idle(queue)


def test_a_collected_slot_is_reported_with_the_place_where_it_was_taken(caplog):
    queue = LLMQueue(2, telemetry=None)

    async def leak():
        await queue.slot().__aenter__()

    line = leak.__code__.co_firstlineno + 1
    asyncio.run(leak())
    gc.collect()
    assert queue.statistics().in_flight == 0
    assert f"the slot taken at {__file__}:{line}, in " in caplog.text
    assert "was never given back" in caplog.text
    assert_idle(queue)


def test_20000_calls_with_random_cancellation_add_up(capsys):
    soak = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "soak.py"))
    assert soak["main"](20_000) == 0, capsys.readouterr().out


@pytest.fixture
def _impatient_threads():
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_impatient_threads")
@pytest.mark.parametrize("cap", [1, 3])
def test_slots_of_four_loops_add_up_while_the_queue_is_resized_and_paused(cap):
    queue, gauge, done = LLMQueue(cap, telemetry=None), Gauge(), threading.Event()

    def in_loop(seed):
        draw = random.Random(seed)

        async def worker():
            for _ in range(100):
                number = draw.random()
                async with queue.slot(LLMTaskMeta(model_name="m") if number < 0.1 else None):
                    with gauge:
                        if number < 0.3:
                            await asyncio.sleep(0)
                if number < 0.5:
                    await asyncio.sleep(0)

        async def main():
            async with asyncio.timeout(PATIENCE):
                await asyncio.gather(*[worker() for _ in range(4)])

        asyncio.run(main())

    def control():
        while not done.is_set():
            queue.resize(max(1, cap // 2))
            queue.pause()
            queue.resume()
            queue.resize(cap)
            queue.statistics()

    with ThreadPoolExecutor(5) as pool:
        controlling = pool.submit(control)
        try:
            for future in [pool.submit(in_loop, seed) for seed in range(4)]:
                future.result(PATIENCE)
        finally:
            done.set()
        controlling.result(PATIENCE)
    assert gauge.peak <= cap
    assert gauge.total == 1600 == queue.statistics().ended[Outcome.SUCCEEDED]
    assert_idle(queue)


def test_a_pass_that_comes_back_in_the_middle_of_a_change_is_counted_once(monkeypatch):
    queue, taken = LLMQueue(4, telemetry=None), []

    async def main():
        first, second = queue.slot(), queue.slot()
        await first.__aenter__()  # lends the rest out
        await second.__aenter__()
        await first.__aexit__(None, None, None)
        token_rates = Scheduler._token_rates

        def another_thread_ends_it(policy):
            if second.lease:
                with contextlib.suppress(StopIteration):
                    second.__aexit__(None, None, None).send(None)
            return token_rates(policy)

        monkeypatch.setattr(Scheduler, "_token_rates", staticmethod(another_thread_ends_it))
        queue.reconfigure(limits=[Cap(1)])
        async with queue.slot():
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05), queue.slot():
                    taken.append("a second seat")

    asyncio.run(main())
    assert taken == []
    assert_idle(queue)


def test_runs_that_have_ended_leave_no_alarm():
    queue = LLMQueue(1, telemetry=None)

    async def two():
        async with anyio.create_task_group() as group:
            for _ in range(2):
                group.start_soon(queue.submit, anyio.lowlevel.checkpoint)

    for _ in range(20):
        trio.run(two)
        asyncio.run(two())
    assert len(queue._alarms) <= 2
    assert_idle(queue)


def test_a_trio_run_that_ends_takes_no_alarm_and_no_harm():
    queue, go = LLMQueue(1, limits=[Rate(5, per="second")], telemetry=None), threading.Event()

    def elsewhere():
        go.wait(PATIENCE)
        for _ in range(2):
            queue.submit_sync(str)

    async def generate():
        try:
            yield 1
        finally:
            go.set()
            while not queue.statistics().waiting:
                time.sleep(0.001)
            for _ in range(5):
                await trio.lowlevel.cancel_shielded_checkpoint()

    async def main():
        for _ in range(2):
            await queue.submit(trio.lowlevel.checkpoint)
        kept.append(generate())
        await anext(kept[0])

    kept = []
    with ThreadPoolExecutor(1) as pool:
        thread = pool.submit(elsewhere)
        trio.run(main)
        thread.result(PATIENCE)
    assert_idle(queue)
