"""The sweep in virtual time, on asyncio: what it measures, recommends and saves."""

import asyncio
import csv
import dataclasses
import fnmatch
import gc
import itertools
import json
import random
import re
import threading
import time
from pathlib import Path

import aiohttp
import pytest

import llmq
from llmq import Pipeline, Retry, RuntimeEnv, Settings
from llmq.errors import ConfigError, ProviderError, VirtualTimeError
from llmq.providers.simulated import SimulatedProvider
from llmq.providers.spec import ProviderSpec
from llmq.tune.guard import Caps
from llmq.tune.point import Point
from llmq.virtual import VirtualLoop
from tests.callers import caller, hiding_retries

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio", {"loop_factory": VirtualLoop}


async def sweep_of(spec, levels=None, **options):
    provider = SimulatedProvider(ProviderSpec(**spec))
    options = {"seconds": 20, "on_progress": lambda _: None, **options}
    return await llmq.sweep(caller(provider), range(10), levels, **options)


def of_level(sweep, level):
    return next(p for p in sweep.points if p.level == level and p.purpose == "level")


async def test_a_request_rate_is_found_and_paced():
    """300 a minute, bucket 5 s deep, mean service time 1 s: 5 a second, so 5 at once are both full and clean."""
    spec = {"latency_seconds": 1, "requests_per_minute": 300, "bucket_seconds": 5}
    found = await sweep_of(spec, [2, 4, 8], calls=200)
    answer = found.recommend()
    assert answer.binds == "requests"
    assert answer.requests_per_minute == pytest.approx(300, rel=0.05)
    assert answer.requests_per_minute < 300
    assert answer.goodput >= 0.95 * 5
    assert answer.share_429 < 0.01
    for point in found.points:
        if point.purpose != "burst" and not point.setting.paced:
            assert (point.share_429 > 0.1) == (point.level > 5), f"at {point.level}"
            assert point.goodput <= 5 * 1.1, "the burst is not counted"


async def test_a_token_rate_is_told_from_a_request_rate_and_paced_in_tokens():
    spec = {"latency_seconds": 1, "tokens_per_minute": 30_000, "bucket_seconds": 5, "sigma": 0.1}
    answer = (await sweep_of(spec, [2, 4, 12], calls=200)).recommend()
    assert answer.binds == "tokens"
    assert answer.tokens_per_minute == pytest.approx(30_000, rel=0.06)
    assert answer.requests_per_minute is None


async def test_a_concurrency_limit_is_found_exactly():
    answer = (await sweep_of({"latency_seconds": 1, "max_concurrency": 12}, [4, 8, 16], calls=200)).recommend()
    assert (answer.level, answer.binds, answer.requests_per_minute) == (12, "concurrency", None)


async def test_short_windows_see_past_what_the_first_refusals_hold_back():
    """The first refusals come when all have started; Retry-After is 1 s, and no service time known that belies it."""
    provider = SimulatedProvider(ProviderSpec(latency_seconds=0.2, sigma=0.1, max_concurrency=12))
    call = caller(provider)

    async def over_a_network(item):
        await asyncio.sleep(0.01)
        return await call(item)

    options = {"virtual": True, "seconds": 1.5, "on_progress": lambda _: None}
    found = await llmq.sweep(over_a_network, range(10), [4, 8, 16, 32], **options)
    answer = found.recommend()
    assert (answer.level, answer.binds) == (12, "concurrency"), str(found)
    for point in (of_level(found, 16), of_level(found, 32)):
        assert point.refused
        assert point.warm_up_seconds > 2, "a second as said, and one in which they come back"


async def test_calls_that_are_held_back_through_a_window_are_not_taken_for_too_few():
    spec = {"latency_seconds": 1.0, "sigma": 0.5, "max_concurrency": 40}
    found = await sweep_of(spec, [16, 32, 64], virtual=True, seconds=0.5, refine=False)
    held = of_level(found, 64)
    assert held.in_flight < 0.9 * 64 < held.in_flight + held.queued
    assert held.refused == 0, "those came before it"
    assert held.limited_by is None


async def test_a_server_that_saturates_has_a_knee():
    found = await sweep_of({"latency_seconds": 1, "load_slots": 8, "sigma": 0.1}, [4, 8, 32], calls=400)
    answer = found.recommend()
    assert answer.level in (8, 9)
    assert answer.binds == "server"
    assert of_level(found, 32).service_p50 > 3


async def test_without_a_limit_more_would_bring_more():
    answer = (await sweep_of({"latency_seconds": 1}, [1, 2, 4])).recommend()
    assert (answer.level, answer.binds) == (4, "latency")
    assert "Raise the levels beyond 4" in answer.reason
    assert "No limit was met" in str(answer)


async def test_a_bound_on_p95_is_kept():
    found = await sweep_of({"latency_seconds": 1, "load_slots": 8, "sigma": 0}, [4, 8, 16], slo_p95=0.9)
    assert found.recommend().level is None
    spec = {"latency_seconds": 1, "load_slots": 8, "sigma": 0}
    found = await sweep_of(spec, [4, 8, 16], calls=450, slo_p95=1.5, refine=False)
    assert found.recommend().level == 8


async def test_goodput_service_time_and_in_flight_are_what_littles_law_says():
    found = await sweep_of({"latency_seconds": 0.5, "sigma": 0}, [4])
    point = of_level(found, 4)
    assert point.goodput == pytest.approx(8.0, rel=0.02)
    assert point.in_flight == pytest.approx(4.0, rel=0.01)
    assert (point.service_p50, point.service_p95) == (pytest.approx(0.5), pytest.approx(0.5))
    assert point.warm_up_seconds >= 0.5
    assert point.window_seconds == pytest.approx(20)
    assert point.limited_by is None
    assert point.cpu_share is None
    assert point.loop_lag_p99 is None


async def test_a_window_is_measured_of_all_its_calls_however_many(monkeypatch):
    """A queue keeps its newest records only, unless it is told to keep all: the rest would be taken for a pause."""
    monkeypatch.setitem(llmq.LLMQueue.__init__.__kwdefaults__, "max_records", 50)
    found = await sweep_of({"latency_seconds": 1, "sigma": 0.1}, [8], calls=400, refine=False)
    assert of_level(found, 8).attempts >= 400
    assert of_level(found, 8).goodput == pytest.approx(8, rel=0.03)


async def test_too_little_to_do_is_the_pipeline_not_the_provider():
    found = await llmq.sweep(
        caller(SimulatedProvider(ProviderSpec(latency_seconds=10, sigma=0))),
        iter(range(6)),
        [16],
        seconds=20,
        on_progress=lambda _: None,
    )
    assert found.points == [], "a window of nothing says nothing of the provider"
    assert found.stopped.startswith("ran out of items after 6 calls; give more items, or a list")
    answer = found.recommend()
    assert answer.level is None
    assert answer.notes[0].startswith("The sweep ran out of items after 6 calls; give more items")


async def test_a_pipeline_is_swept_with_each_levels_own_queue():
    provider = SimulatedProvider(ProviderSpec(latency_seconds=0.5, max_concurrency=6))
    call = caller(provider)
    inner = []

    async def draft(item):
        return await call(item)

    async def polish(item, draft):
        inner.append(llmq.runtime.active_queue())
        return await call(item)

    RuntimeEnv.initialize(Settings(llm_queue_enabled=True, llm_queue_concurrency=1))
    found = await llmq.sweep(Pipeline([draft, polish]), range(5), [2, 4, 6, 8], seconds=10, on_progress=lambda _: None)
    assert found.recommend().level == 6
    assert RuntimeEnv.instance().llm_queue not in inner
    assert RuntimeEnv.instance().llm_queue.records().operations == []


async def test_levels_are_shuffled_and_the_first_comes_again_last():
    found = await sweep_of({"latency_seconds": 0.1}, [1, 2, 4, 8, 16], seconds=2)
    order = [p.level for p in found.points if p.purpose == "level"]
    assert sorted(order) == [1, 2, 4, 8, 16] != order
    assert (found.points[-1].level, found.points[-1].purpose) == (order[0], "drift")
    assert abs(found.drift()) < 0.2


async def test_points_are_saved_as_they_come_and_a_sweep_goes_on_where_it_stopped():
    out = Path("out")
    seen = []

    def stop_after_two(progress):
        if progress.point is not None:
            assert len((out / "points.jsonl").read_text().splitlines()) == progress.done
            with (out / "points.csv").open() as file:
                assert len(list(csv.DictReader(file))) == progress.done
            seen.append(progress.point.level)
            if len(seen) == 2:
                raise KeyError("stop")

    spec = {"latency_seconds": 0.2}
    with pytest.raises(KeyError):
        await sweep_of(spec, [1, 2, 4], out=out, on_progress=stop_after_two)
    with (out / "points.jsonl").open("a") as file:
        file.write('{"torn')
    with pytest.raises(ConfigError, match="holds a sweep already"):
        await sweep_of(spec, [1, 2, 4], out=out)
    again = []
    found = await sweep_of(
        spec, [1, 2, 4], out=out, resume=True, on_progress=lambda p: again.append(p.point.level) if p.point else None
    )
    assert len(again) == len(found.points) - 2
    lines = [json.loads(line) for line in (out / "points.jsonl").read_text().splitlines()]
    assert [line["level"] for line in lines] == [p.level for p in found.points]
    with pytest.raises(ConfigError, match="a point of another sweep"):
        await sweep_of(spec, [1, 2, 4], out=out, resume=True, seconds=3)


@pytest.mark.parametrize("seed", [0, 2])
async def test_levels_that_were_left_out_give_their_time_to_what_the_sweep_adds(seed):
    """20 a second, 0.2 s each: 32 and 64 can only be refused more; what is left must do to come down from 10 to 5."""
    spec = {"latency_seconds": 0.2, "sigma": 0, "requests_per_minute": 1200}
    found = await sweep_of(spec, [4, 8, 16, 32, 64], seconds=5, seed=seed)
    assert {p.level for p in found.points if p.purpose == "level"} == {4, 8, 16}
    assert found.recommend().level in (4, 5, 6)


async def test_a_folder_without_points_is_a_new_one():
    """A sweep that was not wanted after its first few calls leaves one."""
    stopped = await sweep_of({"latency_seconds": 0.1}, [1], out="out", refine=False, on_plan=lambda _: False)
    assert stopped.points == []
    assert Path("out/points.jsonl").read_text() == ""
    found = await sweep_of({"latency_seconds": 0.1}, [1], out="out", refine=False)
    assert len(found.points) == len(Path("out/points.jsonl").read_text().splitlines()) > 0


async def test_a_resumed_sweep_still_knows_that_a_rate_limit_refuses():
    """Else its next refusal would be taken for the first, and what was paid for would be measured again."""
    spec = {"latency_seconds": 0.1, "requests_per_minute": 900}  # the first look at 32 is too short to be refused
    first = await sweep_of(spec, [1, 2], out="out", refine=False, seconds=2, seed=1)
    lines = Path("out/points.jsonl").read_text().splitlines()
    known = json.loads(lines[0]) | {"refused_by": "requests", "level": 99, "refused": 20, "order": 50}
    Path("out/points.jsonl").write_text("".join(f"{line}\n" for line in [*lines, json.dumps(known)]))
    found = await sweep_of(spec, [1, 2, 32], out="out", resume=True, refine=False, seconds=2, seed=1)
    ended_with = [p.purpose.replace("drift", "more") for p in first.points]
    assert [p.purpose for p in found.points][: len(first.points)] == ended_with
    assert not [p for p in found.points if p.purpose == "burst"]


async def test_a_limit_found_midway_makes_what_came_before_be_measured_again():
    """A bucket that is full at first lets 16 through for a while."""
    spec = {"latency_seconds": 0.1, "requests_per_minute": 3000, "bucket_seconds": 10}
    found = await sweep_of(spec, [2, 4, 16], seconds=3, refine=False)
    assert found.recommend().binds == "requests"
    bursts = {p.level for p in found.points if p.purpose == "burst"}
    assert bursts
    assert bursts <= {p.level for p in found.points if p.purpose == "level"}, "each was measured again"


async def test_a_bucket_is_emptied_only_for_a_level_that_could_live_on_it():
    provider = SimulatedProvider(ProviderSpec(latency_seconds=1, requests_per_minute=1200, bucket_seconds=30))
    sent, rested = [], 600

    def note(progress):
        if progress.point is not None:
            before = sum(calls for _, calls in sent)
            sent.append((progress.point.level, provider.stats()["requests"] - before))

    await llmq.sweep(
        caller(provider), range(10), [2, 16, 64], virtual=True, calls=1500, refine=False, seed=7, on_progress=note
    )
    levels = dict(sent)
    assert list(levels) == [64, 2, 16], "the limit is known first, and the bucket rests before 16"
    assert levels[16] > 1500 + rested
    assert 1500 <= levels[2] < 1510


def test_two_virtual_sweeps_with_one_seed_are_equal_and_leave_the_callers_random_numbers_alone():
    spec = {"latency_seconds": 0.5, "sigma": 0.5, "requests_per_minute": 600, "bucket_seconds": 5, "seed": 1}

    def swept(seed):
        provider = SimulatedProvider(ProviderSpec(**spec))
        asked = llmq.sweep(
            caller(provider), range(10), [2, 8], virtual=True, calls=100, seed=seed, on_progress=lambda _: None
        )
        return asyncio.run(asked).points

    random.seed(1)
    first = swept(3)
    random.seed(2)
    before = random.getstate()
    assert swept(3) == first
    assert random.getstate() == before
    assert any(p.retried for p in first), "what is drawn is the jitter of retries"
    assert swept(4) != first


async def test_a_complete_sweep_is_resumed_without_a_call():
    provider = SimulatedProvider(ProviderSpec(latency_seconds=0.1))
    options = {"seconds": 1, "out": "out", "on_progress": lambda _: None}
    first = await llmq.sweep(caller(provider), range(5), [1, 2], **options)
    before = provider.stats()["requests"]
    again = await llmq.sweep(caller(provider), range(5), [1, 2], resume=True, **options)
    assert provider.stats()["requests"] == before
    assert again.points == first.points


async def test_a_call_that_submits_by_itself_needs_no_second_slot():
    async def nested(item):
        return await llmq.submit(lambda: asyncio.sleep(0.1))

    RuntimeEnv.initialize(Settings(llm_queue_enabled=True))
    for target in (nested, Pipeline([nested])):
        found = await llmq.sweep(target, range(5), [1, 2], seconds=2, on_progress=lambda _: None)
        assert of_level(found, 2).goodput == pytest.approx(20, rel=0.05)


@pytest.mark.parametrize(
    ("status", "body", "most"),
    [(401, None, 60), (429, {"code": "insufficient_quota"}, 60), (429, None, 300), (None, None, 300)],
)
async def test_a_provider_that_never_succeeds_ends_the_sweep_in_safe_words(status, body, most):
    calls = []

    async def fails(item):
        calls.append(item)
        await asyncio.sleep(0.1)
        if status is None:
            raise ConnectionResetError
        raise ProviderError("your key sk-planted is bad", status_code=status, body=body)

    with pytest.raises(ProviderError, match="none of the first") as caught:
        await llmq.sweep(fails, range(5), on_progress=lambda _: None)
    assert "sk-planted" not in str(caught.value)
    assert len(calls) <= most


async def test_retries_of_the_callers_own_sdk_are_told():
    found = await llmq.sweep(hiding_retries(), range(5), [2], seconds=5, on_progress=lambda _: None)
    assert "Your client retries by itself" in str(found.recommend())


async def test_nothing_runs_on_after_a_sweep_or_its_cancellation():
    provider = SimulatedProvider(ProviderSpec(latency_seconds=1))
    task = asyncio.create_task(llmq.sweep(caller(provider), range(5), [4, 8], on_progress=lambda _: None))
    await asyncio.sleep(3)
    assert provider.stats()["in_flight"] > 0
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert provider.stats()["in_flight"] == 0
    before = provider.stats()["requests"]
    await asyncio.sleep(10)
    assert provider.stats()["requests"] == before


async def test_a_bug_in_the_callers_coroutine_is_told_at_once():
    async def broken(item):
        raise TypeError("my bug")

    with pytest.raises(TypeError, match="my bug"):
        await llmq.sweep(broken, range(5), on_progress=lambda _: None)


@pytest.mark.parametrize(
    ("levels", "items", "options", "message"),
    [
        ([0, 1], [1], {}, "each at least 1"),
        ([], [1], {}, "each at least 1"),
        ([1], [], {}, "at least one item"),
        ([1.5], [1], {}, "whole numbers"),
        ([True], [1], {}, "whole numbers"),
        ([1], [1], {"seconds": 0}, "seconds must be more than 0"),
        ([1], [1], {"seconds": float("inf")}, "finite"),
        ([1], [1], {"max_429_ratio": 5}, "max_429_ratio is a share"),
        ([1], [1], {"slo_p95": -1}, "slo_p95 must be more than 0"),
    ],
)
async def test_what_cannot_be_swept_is_refused(levels, items, options, message):
    with pytest.raises(ConfigError, match=message):
        await llmq.sweep(asyncio.sleep, items, levels, **options)


async def test_errors_of_the_provider_keep_a_level_from_being_recommended():
    found = await sweep_of({"latency_seconds": 0.2, "error_ratio": 0.5}, [2, 4], retry=Retry(1))
    answer = found.recommend()
    assert answer.level is None
    assert "error share" in answer.reason


async def test_frame_table_and_picture():
    spec = {"latency_seconds": 1, "requests_per_minute": 300, "bucket_seconds": 5}
    found = await sweep_of(spec, [2, 4, 8], title="demo", calls=100)
    frame = found.frame
    paced = frame["requests_per_minute"].notna()
    assert list(frame.index) == list(frame.assign(paced=paced).sort_values(["paced", "level", "order"]).index)
    assert paced.any()
    assert frame["goodput"].max() > 4
    text = str(found)
    assert text.splitlines()[0] == "demo"
    assert found.plot()._repr_png_().startswith(b"\x89PNG")


def test_each_column_of_the_frame_is_told_in_the_docstring():
    columns = [field.name for field in dataclasses.fields(Point)]
    assert list(llmq.Sweep([]).frame.columns) == columns
    told = re.findall(r"`([a-z0-9_*]+)`", Point.__doc__)
    for column in columns:
        base = column.removesuffix("_low").removesuffix("_high")
        assert any(fnmatch.fnmatch(base, name) for name in told if name not in ("*_low", "*_high")), column


# --- caps


def counted(provider):
    """A call that tells its tokens, of a model with a name."""
    call = caller(provider)

    async def tells(item):
        answer = await call(item)
        return {"usage": {"prompt_tokens": 40, "completion_tokens": 60}, "model": "m", "text": answer.content}

    return tells


@pytest.mark.parametrize("most", [5, 40, 150])
async def test_a_cap_on_calls_is_exact_at_the_provider(most):
    provider = SimulatedProvider(ProviderSpec(latency_seconds=0.5, max_concurrency=6))
    options = {"seconds": 5, "caps": Caps(calls=most), "on_progress": lambda _: None}
    found = await llmq.sweep(caller(provider), range(10), [2, 4, 8], **options)
    assert found.stopped == f"stopped at the cap of {most} calls"
    assert provider.stats()["requests"] == most
    assert provider.stats()["in_flight"] == 0
    assert f"The sweep stopped at the cap of {most} calls." in found.recommend().notes


@pytest.mark.parametrize(("caps", "met"), [(Caps(tokens=24_000), "24000 tokens"), (Caps(minutes=0.75), "0.75 minutes")])
async def test_other_caps_stop_the_sweep_and_keep_its_points(caps, met):
    provider = SimulatedProvider(ProviderSpec(latency_seconds=1))
    options = {"seconds": 10, "caps": caps, "refine": False, "out": "out", "on_progress": lambda _: None}
    found = await llmq.sweep(counted(provider), range(10), [2, 4, 8], **options)
    assert found.stopped == f"stopped at the cap of {met}"
    assert 1 <= len(found.points) <= 3
    assert len(Path("out/points.jsonl").read_text().splitlines()) == len(found.points)
    if caps.tokens:
        answered = provider.stats()["by_status"]["200"]
        assert caps.tokens <= 100 * answered <= caps.tokens + 8 * 100, "at most those in flight at the cap"
    assert provider.stats()["in_flight"] == 0


async def test_without_a_cap_nothing_stops_it():
    found = await sweep_of({"latency_seconds": 0.1}, [1], seconds=1, refine=False)
    assert found.stopped is None


@pytest.mark.parametrize("wanted", [True, False])
async def test_the_plan_is_told_after_a_few_calls_and_may_be_declined(wanted):
    provider = SimulatedProvider(ProviderSpec(latency_seconds=0.5, sigma=0))
    plans = []

    def on_plan(prediction):
        plans.append((prediction, provider.stats()["requests"]))
        return wanted

    options = {"seconds": 5, "on_plan": on_plan, "refine": False, "on_progress": lambda _: None}
    found = await llmq.sweep(counted(provider), range(10), [2, 4], **options)
    ((prediction, requests),) = plans
    assert requests <= 16
    # 2, 4 and 2 again, each for 5 s and two service times; and 5 s of 8 calls/s before
    assert (prediction.calls, prediction.tokens) == (136, 13_600)
    assert found.predicted == prediction
    if wanted:
        assert len(found.points) == 3
    else:
        assert (found.points, provider.stats()["requests"]) == ([], requests)
        assert "was not wanted" in found.stopped


# --- open loop


async def test_a_stall_shows_in_response_times_and_not_in_service_times():
    """Once a minute nothing ends for 5 s: 2 calls are slow, and 98 that came meanwhile wait."""

    async def stalls(item):
        since = asyncio.get_running_loop().time() % 60
        await asyncio.sleep(max(0.01, 5 - since))

    options = {"seconds": 60, "refine": False, "on_progress": lambda _: None}
    found = await llmq.sweep(stalls, range(5), [2], arrivals=20.0, **options)
    point = of_level(found, 2)
    assert point.service_p95 < 0.1
    assert point.response_p95 > 1.0
    assert point.response_quantiles[-1] == pytest.approx(5.0, abs=0.5)
    closed = of_level(await llmq.sweep(stalls, range(5), [2], **options), 2)
    assert closed.offered_rate is None


async def test_arrivals_at_random_come_at_their_rate_whatever_the_level():
    found = await sweep_of({"latency_seconds": 0.2}, [8, 16], seconds=60, arrivals=10.0, refine=False)
    for point in found.points:
        assert point.offered_rate == 10.0
        assert point.attempt_rate == pytest.approx(10, rel=0.15)
        assert point.in_flight == pytest.approx(2, rel=0.2), "Little's law"
        assert point.limited_by is None


async def test_arrivals_are_replayed_over_and_over():
    starts = []

    async def call(item):
        starts.append(asyncio.get_running_loop().time())
        await asyncio.sleep(0.001)

    options = {"seconds": 30, "refine": False, "on_progress": lambda _: None}
    found = await llmq.sweep(call, range(5), [8], arrivals=[100.0, 100.25, 101.0], **options)
    assert found.points[0].offered_rate == 2.0
    gaps = [round(b - a, 6) for a, b in itertools.pairwise(starts)][-11:-2]
    turns = {tuple(gaps[n : n + 3]) for n in range(0, 9, 3)}
    assert len(turns) == 1
    assert sorted(turns.pop()) == [0.25, 0.5, 0.75]


@pytest.mark.parametrize(
    "arrivals", [0, -1.0, float("nan"), float("inf"), [], [1.0], [2.0, 1.0], [1.0, 1.0], "often", object()]
)
async def test_bad_arrivals_are_refused(arrivals):
    with pytest.raises(ConfigError, match="arrivals"):
        await llmq.sweep(asyncio.sleep, [1], [1], arrivals=arrivals)


async def test_arrivals_of_a_pipeline_are_refused():
    async def draft(item):
        return item

    with pytest.raises(ConfigError, match="a pipeline's calls come from its stages"):
        await llmq.sweep(Pipeline([draft]), [1], [1], arrivals=5.0)


# --- what is saved


async def test_what_was_seen_of_limits_survives_a_resume():
    for spec in ({"requests_per_minute": 600, "bucket_seconds": 2}, {"max_concurrency": 3}):
        out = f"out-{next(iter(spec))}"
        options = {"seconds": 10, "refine": False, "out": out}
        first = await sweep_of({"latency_seconds": 0.2, **spec}, [2, 8], **options)
        again = await sweep_of({"latency_seconds": 0.2, **spec}, [2, 8], resume=True, **options)
        assert again.points == first.points
        assert again.recommend() == first.recommend()
        refused = of_level(again, 8)
        assert type(refused.ok_blocks) is type(refused.service_quantiles) is tuple
        assert refused.separation.let_in >= 1
        assert (refused.rate is not None) == ("requests_per_minute" in spec)


async def test_a_resumed_sweep_ends_as_one_that_was_never_stopped():
    """The same windows, and the same answer; calls without spread, so that chance has no part."""
    spec = {"latency_seconds": 0.5, "max_concurrency": 6, "sigma": 0}

    def stop_after_two(progress):
        if progress.point is not None and progress.done == 2:
            raise KeyError("stop")

    whole = await sweep_of(spec, [2, 4, 8], calls=100)
    with pytest.raises(KeyError):
        await sweep_of(spec, [2, 4, 8], calls=100, out="out", on_progress=stop_after_two)
    resumed = await sweep_of(spec, [2, 4, 8], calls=100, out="out", resume=True)
    assert [(p.setting, p.purpose) for p in resumed.points] == [(p.setting, p.purpose) for p in whole.points]
    assert resumed.recommend().setting == whole.recommend().setting
    assert [p.order for p in resumed.points] == list(range(len(whole.points)))


# --- on a virtual clock, from a plain loop


def virtual_sweep(call, levels=(2, 4), **options):
    return llmq.sweep(
        call, range(10), list(levels), **{"virtual": True, "calls": 200, "on_progress": lambda _: None, **options}
    )


def test_a_virtual_sweep_from_a_plain_loop():
    provider = SimulatedProvider(ProviderSpec(latency_seconds=30, sigma=0))
    before = threading.active_count()
    found = asyncio.run(virtual_sweep(caller(provider), refine=False))
    assert of_level(found, 4).goodput == pytest.approx(4 / 30, rel=0.02)
    assert of_level(found, 4).attempts >= 200
    assert of_level(found, 4).cpu_share is None
    assert [p.level for p in found.points] == [2, 4, 2] or [p.level for p in found.points] == [4, 2, 4]
    assert threading.active_count() == before


def test_during_a_virtual_sweep_garbage_is_looked_for_less_often():
    usual, during = gc.get_threshold(), []
    assert usual[0] < 20_000
    provider = SimulatedProvider(ProviderSpec(latency_seconds=1))

    async def main():
        def on_progress(_):
            during.append(gc.get_threshold())

        await asyncio.gather(*(virtual_sweep(caller(provider), calls=20, on_progress=on_progress) for _ in range(2)))

    asyncio.run(main())
    assert during[0] == (20_000, *usual[1:])
    assert gc.get_threshold() == usual


def test_a_virtual_sweep_ends_with_the_task_that_awaits_it():
    provider = SimulatedProvider(ProviderSpec(latency_seconds=1))
    before = threading.active_count()

    async def main():
        loop = asyncio.get_running_loop()
        cancelled = threading.Event()

        def cancel():
            task.cancel()
            cancelled.set()

        def on_progress(_):
            loop.call_soon_threadsafe(cancel)
            cancelled.wait(30)

        task = asyncio.create_task(virtual_sweep(caller(provider), calls=20_000, on_progress=on_progress))
        with pytest.raises(asyncio.CancelledError):
            await task
        assert provider.stats()["in_flight"] == 0
        assert provider.stats()["requests"] < 20_000
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
    assert threading.active_count() == before


async def ask_over_http(item):
    async with aiohttp.ClientSession() as session, session.get("http://127.0.0.1:9/"):
        pass


async def ask_a_thread(item):
    await asyncio.to_thread(time.monotonic)


@pytest.mark.parametrize("call", [ask_over_http, ask_a_thread])
def test_what_cannot_be_virtual_is_refused_and_no_hang(call):
    with pytest.raises(VirtualTimeError, match="VirtualLoop"):
        asyncio.run(virtual_sweep(call))


def test_an_error_of_a_virtual_sweep_is_raised_where_it_is_awaited():
    async def broken(item):
        raise TypeError("my bug")

    with pytest.raises(TypeError, match="my bug"):
        asyncio.run(virtual_sweep(broken))


@pytest.mark.parametrize("window", ["fixed", "sliding"])
async def test_a_window_that_says_no_retry_after_is_found_and_paced(window):
    """Windows of 10 s, and a limit whose own is a minute long: it is waited for once it is seen to be closed."""
    spec = {"requests_per_minute": 300, "latency_seconds": 2.0, "window": window, "retry_after": "none"}
    found = await sweep_of(spec, [4, 8, 16, 32], seconds=10)
    answer = found.recommend()
    assert answer.binds == "requests"
    assert 285 <= answer.requests_per_minute <= 300
    assert answer.share_429 <= 0.01
