"""How a sweep and its verification end: at caps, out of items, cancelled, resumed, with what cannot be measured."""

import asyncio
import json
import re
import shutil
import threading
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import llmq
import llmq.virtual
from llmq import Pipeline, Price, Retry
from llmq.errors import ConfigError, ProviderError
from llmq.pipeline import Stage
from llmq.providers.simulated import SimulatedProvider
from llmq.providers.spec import ProviderSpec
from llmq.tune.guard import Caps, Stopped, Used
from llmq.tune.point import Setting
from llmq.tune.runner import Load, Runner
from llmq.tune.verify import verify
from llmq.virtual import VirtualLoop, in_virtual_time
from tests.callers import caller, hiding_retries

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio", {"loop_factory": VirtualLoop}


def quiet(call, items, levels, **options):
    return llmq.sweep(call, items, levels, **{"seconds": 5, "on_progress": lambda _: None, **options})


# --- caps


@pytest.mark.parametrize("most", [700, 900, 1300])
async def test_no_call_of_a_verification_starts_beyond_the_cap_with_the_flag_off_too(most):
    provider = SimulatedProvider(ProviderSpec(latency_seconds=1))
    with pytest.raises(Stopped, match=f"cap of {most} calls"):
        await verify(caller(provider), range(10), Setting(4), caps=Caps(calls=most), open_items=64)
    assert provider.stats()["requests"] == most
    assert provider.stats()["in_flight"] == 0


@pytest.mark.parametrize("gated", [True, False])
async def test_the_stages_of_a_pipeline_count_with_the_flag_off(gated):
    provider = SimulatedProvider(ProviderSpec(latency_seconds=1))
    call = caller(provider)
    target = Pipeline([Stage("only", call if gated else lambda item: llmq.submit(lambda: call(item)), gated=gated)])
    with pytest.raises(Stopped, match="cap of 1300 calls"):
        await verify(target, range(10), Setting(4), caps=Caps(calls=1300), open_items=64)
    assert provider.stats()["requests"] == 1300


async def test_a_window_does_not_begin_at_a_cap():
    provider = SimulatedProvider(ProviderSpec(latency_seconds=1))
    measuring = Runner(
        caller(provider), [1], load=Load(), retry=Retry(), request_timeout=None, open_items=1, highest=2,
        caps=Caps(calls=5), prices={},
    )  # fmt: skip
    measuring.used.calls = 5
    with pytest.raises(Stopped, match="cap of 5 calls"):
        await measuring.settle(10)
    assert provider.stats()["requests"] == 0


def test_what_is_left_of_the_caps():
    used = Used(Caps(calls=10, tokens=1000, cost=2.0, minutes=5), {})
    used.calls, used.tokens, used.cost = 4, 300, 0.5
    left = used.left()
    assert (left.calls, left.tokens, left.cost) == (6, 700, 1.5)
    assert left.minutes == pytest.approx(5, abs=0.1)
    used.calls = 10
    assert used.left() is None
    assert Used(Caps(), {}).left() == Caps()


async def test_a_sweep_tells_what_its_caps_leave():
    provider = SimulatedProvider(ProviderSpec(latency_seconds=1))
    found = await quiet(caller(provider), range(5), [1], refine=False, caps=Caps(calls=500))
    assert found.left.calls == 500 - provider.stats()["requests"]
    found = await quiet(caller(provider), range(5), [4], refine=False, caps=Caps(calls=20))
    assert found.left is None


@pytest.mark.parametrize("options", [{"calls": 500}, {"virtual": True}])
async def test_a_cap_that_leaves_no_window_is_refused_before_anything_is_called(options):
    provider = SimulatedProvider(ProviderSpec(latency_seconds=1))
    options = {"seconds": None, "caps": Caps(calls=500), **options}
    with pytest.raises(ConfigError, match=r"a window has \d+ calls, and the cap is 500, so no level would be measured"):
        await quiet(caller(provider), range(5), [1], **options)
    assert provider.stats()["requests"] == 0


@pytest.mark.parametrize(
    ("caps", "tokens", "prices", "message"),
    [
        (Caps(tokens=100), False, {}, "cap of 100 tokens cannot be kept: no call has told its tokens"),
        (Caps(cost=0.5), False, {}, "cap of 0.50 USD cannot be kept: no call has told its tokens"),
        (Caps(cost=0.5), True, {"other": Price(1, 1)}, "cap of 0.50 USD cannot be kept: not every model .*llm_prices"),
    ],
)
async def test_a_cap_that_cannot_be_counted_is_refused_after_the_first_calls(caps, tokens, prices, message):
    provider = SimulatedProvider(ProviderSpec(latency_seconds=1))
    with pytest.raises(ConfigError, match=message):
        await quiet(caller(provider, tokens), range(5), [1, 2], caps=caps, prices=prices)
    assert provider.stats()["requests"] <= 16


@pytest.mark.parametrize("error", [ProviderError("planted sk-x", status_code=503), ConnectionResetError("down")])
async def test_a_dead_provider_is_told_though_a_cap_stops_first(error):
    async def fails(item):
        await asyncio.sleep(0.1)
        raise error

    with pytest.raises(ProviderError, match="none of the first 3 calls .*stopped at the cap of 3 calls") as caught:
        await quiet(fails, range(5), [4], caps=Caps(calls=3))
    assert caught.value.__cause__ is error
    assert "sk-x" not in str(caught.value)


async def test_a_dead_provider_is_told_though_the_items_end_first():
    async def fails(item):
        await asyncio.sleep(0.1)
        raise ProviderError("busy", status_code=503)

    with pytest.raises(ProviderError, match="none of the first 2 calls .*no more items"):
        await quiet(fails, iter([1, 2]), [4], retry=Retry(1))


# --- verification


async def test_a_verification_holds_until_the_share_is_proven_at_a_low_level_too():
    provider = SimulatedProvider(ProviderSpec(latency_seconds=5))
    found = await verify(caller(provider), range(10), Setting(1), seconds=10, open_items=1)
    assert found.point.attempts >= 400
    assert found.checks[0].holds is True


# --- the end of a window


def watchers():
    return [t for t in asyncio.all_tasks() if "_ClientMeter" in t.get_coro().__qualname__]


def test_no_meter_runs_on_after_a_cap():
    async def main():
        async def call(item):
            await asyncio.sleep(0.001)

        found = await quiet(call, range(3), [1, 2], calls=60, seconds=None, caps=Caps(calls=90))
        await asyncio.sleep(0)
        assert found.stopped == "stopped at the cap of 90 calls"
        assert watchers() == []

    asyncio.run(main())


async def test_an_iterator_that_ends_stops_the_sweep_and_keeps_what_was_measured():
    provider = SimulatedProvider(ProviderSpec(latency_seconds=1))
    found = await quiet(caller(provider), iter(range(300)), [1, 2, 4, 8], seconds=10, out="out")
    assert re.match(r"ran out of items after \d+ calls; give more items, or a list", found.stopped)
    assert found.points
    assert all(p.attempts for p in found.points)


async def test_calls_that_take_no_virtual_time_are_refused():
    async def instant(item):
        return item

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ConfigError, match="takes no virtual time, so there is nothing to measure"):
            await quiet(instant, range(5), [1, 2])


# --- resumed


def a_folder_is_removed(at):
    def on_progress(progress):
        if progress.point is None and progress.done == at:
            shutil.rmtree("out")

    return on_progress


async def test_a_folder_that_is_removed_midway_is_told():
    provider = SimulatedProvider(ProviderSpec(latency_seconds=1))
    with pytest.raises(ConfigError, match="cannot write to out: No such file"):
        await quiet(caller(provider), range(5), [1, 2], out="out", on_progress=a_folder_is_removed(1))


async def test_a_folder_that_is_removed_does_not_hide_what_went_wrong_first():
    def on_progress(progress):
        shutil.rmtree("out")
        raise KeyError("mine")

    provider = SimulatedProvider(ProviderSpec(latency_seconds=1))
    with pytest.raises(KeyError, match="mine"):
        await quiet(caller(provider), range(5), [1, 2], out="out", on_progress=on_progress)


async def test_a_sweep_that_is_resumed_with_more_levels_is_sharpened_and_ends_in_its_own_drift():
    provider = SimulatedProvider(ProviderSpec(latency_seconds=1, max_concurrency=6, sigma=0))
    first = await quiet(caller(provider), range(5), [1, 2], out="out", seconds=20)
    assert first.points[-1].purpose == "drift"
    found = await quiet(caller(provider), range(5), [1, 2, 4, 8], out="out", seconds=20, resume=True)
    assert [p.purpose for p in found.points].count("drift") == 1
    assert found.points[-1].purpose == "drift"
    assert found.recommend().level == 6, "it looked between 4 and 8"
    saved = [json.loads(line)["purpose"] for line in Path("out/points.jsonl").read_text().splitlines()]
    assert saved == [p.purpose for p in found.points]


async def test_a_finished_sweep_that_is_resumed_knows_what_it_knew():
    first = await quiet(hiding_retries(), range(5), [2], out="out")
    assert first.hidden_retries
    again = await quiet(hiding_retries(), range(5), [2], out="out", resume=True)
    assert (again.hidden_retries, again.predicted) == (True, first.predicted)


@pytest.mark.parametrize("error", [ValueError, None])
async def test_calls_that_begin_to_take_no_time_do_not_hold_a_virtual_clock_for_ever(error):
    calls = 0

    async def call(item):
        nonlocal calls
        calls += 1
        if calls <= 60:
            await asyncio.sleep(1)
        elif error is not None:
            raise error

    with pytest.raises(ConfigError, match="calls in a row took no virtual time.* let each wait by the loop's timers"):
        await quiet(call, range(5), [2], calls=100, seconds=None)


@pytest.mark.parametrize("target", [None, 3, "ask"])
async def test_what_cannot_be_measured_is_refused_before_anything_is_called(target):
    for measured in (quiet(target, range(5), [2]), verify(target, range(5), Setting(2))):
        with pytest.raises(ConfigError, match=f"a Pipeline, or an async function of one item; got {target!r}"):
            await measured


async def test_a_plain_function_is_told_that_it_cannot_be_awaited():
    with pytest.raises(ConfigError, match="returned int, which cannot be awaited; use an asynchronous client"):
        await quiet(lambda _: 3, range(5), [2])


# --- items and levels


@pytest.mark.parametrize("items", [pd.Series(["a", "b"]), np.array(["a", "b"]), np.array([[1, 2], [3, 4]])])
async def test_series_and_arrays_are_items_over_and_over(items):
    provider = SimulatedProvider(ProviderSpec(latency_seconds=1))
    found = await quiet(caller(provider), items, np.array([1, 2]), refine=False)
    assert {p.level for p in found.points} == {1, 2}
    assert {type(p.level) for p in found.points} == {int}


@pytest.mark.parametrize("levels", [[np.float64(2)], [np.bool_(True)], np.array([1.5]), [None]])
async def test_levels_that_are_no_whole_numbers_are_refused(levels):
    with pytest.raises(ConfigError, match="whole numbers"):
        await quiet(asyncio.sleep, [1], levels)


async def test_a_frame_as_items_is_refused():
    with pytest.raises(ConfigError, match="names of its columns; give a column"):
        await quiet(asyncio.sleep, pd.DataFrame({"prompt": ["a"]}), [1])


@pytest.mark.parametrize("items", [pd.Series([], dtype=str), np.array([])])
async def test_nothing_in_a_series_is_refused(items):
    with pytest.raises(ConfigError, match="at least one item"):
        await quiet(asyncio.sleep, items, [1])


# --- open loop


def first_arrivals(number, seed=0):
    one = Runner(
        asyncio.sleep, [1], load=Load(arrivals=5.0, seed=seed), retry=Retry(), request_timeout=None, open_items=1,
        highest=1, caps=Caps(), prices={},
    )  # fmt: skip
    times = one._arrival_times(0.0, number)
    return [next(times) for _ in range(5)]


async def test_each_window_has_arrivals_of_its_own_and_the_same_ones_again_by_its_seed():
    assert first_arrivals(1) == first_arrivals(1)
    assert first_arrivals(1) != first_arrivals(2)
    assert first_arrivals(1) != first_arrivals(1, seed=1)


# --- a loop of its own


def cancelled_at(moment, main):
    """Cancel what awaits `main` on a virtual clock: at a moment of its thread."""

    async def run():
        waiting = asyncio.create_task(in_virtual_time(main))
        await asyncio.to_thread(moment.wait, 30)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(run())


def test_cancelled_after_its_loop_has_ended(monkeypatch):
    ended, cancelled = threading.Event(), threading.Event()
    plain = asyncio.Runner.__exit__

    def exits(self, *arguments):
        plain(self, *arguments)
        if threading.current_thread() is not threading.main_thread():
            ended.set()
            cancelled.wait(30)

    class Telling(VirtualLoop):
        def call_soon_threadsafe(self, *arguments, **options):
            if ended.is_set():
                cancelled.set()
            return super().call_soon_threadsafe(*arguments, **options)

    monkeypatch.setattr(asyncio.Runner, "__exit__", exits)
    monkeypatch.setattr(llmq.virtual, "VirtualLoop", Telling)

    async def main():
        return 1

    cancelled_at(ended, main)


def test_cancelled_where_its_thread_died_before_it_started(monkeypatch):
    died = threading.Event()

    class Broken:
        def __init__(self, **_options):
            died.set()
            raise MemoryError

    async def main():
        return 1

    async def run():
        plain, asyncio.Runner = asyncio.Runner, Broken
        try:
            waiting = asyncio.create_task(in_virtual_time(main))
            for _ in range(3):
                await asyncio.sleep(0)
            waiting.cancel()
            async with asyncio.timeout(10):
                with pytest.raises(asyncio.CancelledError):
                    await waiting
        finally:
            asyncio.Runner = plain
        assert died.is_set()

    asyncio.run(run())
