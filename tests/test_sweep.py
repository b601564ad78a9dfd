"""The sweep in virtual time, on asyncio: what it measures, recommends and saves."""

import asyncio
import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import llmq
from llmq import Pipeline, Retry, RuntimeEnv, Settings
from llmq.errors import ConfigError, ProviderError
from llmq.providers.chat import ChatRequest
from llmq.providers.simulated import SimulatedProvider
from llmq.providers.spec import ProviderSpec
from llmq.virtual import VirtualLoop

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio", {"loop_factory": VirtualLoop}


def caller(provider):
    count = 0

    async def call(item):
        nonlocal count
        count += 1
        return await provider.complete(ChatRequest("m", [{"role": "user", "content": f"{item} {count}"}]))

    return call


async def sweep_of(spec, levels=None, **options):
    provider = SimulatedProvider(ProviderSpec(**spec))
    options = {"seconds": 20, "on_progress": lambda _: None, **options}
    return await llmq.sweep(caller(provider), range(10), levels, **options)


def of_level(sweep, level):
    return next(p for p in sweep.points if p.level == level and p.purpose == "level")


@pytest.mark.parametrize("seed", range(3))
async def test_a_request_rate_is_found_with_its_level(seed):
    """300 a minute, bucket 60 s deep, mean service time 1 s: 5 a second, so 5 at once."""
    found = await sweep_of({"latency_seconds": 1, "requests_per_minute": 300, "seed": seed}, seconds=60)
    answer = found.recommend()
    assert answer.level == 5
    assert answer.binds == "requests"
    assert answer.goodput >= 0.95 * 5
    assert answer.share_429 < 0.01
    for point in found.points:
        if point.level <= 4:
            assert point.share_429 == 0, f"429s below the limit, at {point.level}"
        if point.level >= 6:
            assert point.share_429 > 0.1, f"no 429s above the limit, at {point.level}"
            assert point.goodput <= 5 * 1.1, "the burst is not counted"


async def test_a_token_rate_is_told_from_a_request_rate():
    spec = {"latency_seconds": 1, "tokens_per_minute": 30_000, "bucket_seconds": 10, "sigma": 0.1}
    answer = (await sweep_of(spec, [1, 2, 4, 8], seconds=60)).recommend()
    assert answer.binds == "tokens"
    assert answer.level in (4, 5)


async def test_a_concurrency_limit_is_found_exactly():
    found = await sweep_of({"latency_seconds": 1, "max_concurrency": 12})
    answer = found.recommend()
    assert (answer.level, answer.binds) == (12, "concurrency")


async def test_a_server_that_saturates_has_a_knee():
    found = await sweep_of({"latency_seconds": 1, "load_slots": 8})
    answer = found.recommend()
    assert answer.level in (8, 9)
    assert answer.binds == "server"
    assert of_level(found, 64).service_p50 > 4


async def test_without_a_limit_more_would_bring_more():
    answer = (await sweep_of({"latency_seconds": 1}, [1, 2, 4])).recommend()
    assert (answer.level, answer.binds) == (4, "latency")
    assert "Raise the levels beyond 4" in answer.reason
    assert "No limit was met" in str(answer)


async def test_a_bound_on_p95_is_kept():
    found = await sweep_of({"latency_seconds": 1, "load_slots": 8, "sigma": 0}, [4, 8, 16], slo_p95=0.9)
    assert found.recommend().level is None
    found = await sweep_of({"latency_seconds": 1, "load_slots": 8, "sigma": 0}, [4, 8, 16], slo_p95=1.5, refine=False)
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


async def test_too_little_to_do_is_the_pipeline_not_the_provider():
    found = await llmq.sweep(
        caller(SimulatedProvider(ProviderSpec(latency_seconds=10, sigma=0))),
        iter(range(6)),
        [16],
        seconds=20,
        on_progress=lambda _: None,
    )
    assert found.points[0].limited_by == "pipeline"
    answer = found.recommend()
    assert (answer.level, answer.binds) == (None, "pipeline")
    assert "more items" in answer.reason


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


async def test_a_resumed_sweep_still_knows_that_a_rate_limit_refuses():
    """Else its next refusal would be taken for the first, and what was paid for would be measured again."""
    spec = {"latency_seconds": 0.1, "requests_per_minute": 900}  # the first look at 32 is too short to be refused
    first = await sweep_of(spec, [1, 2], out="out", refine=False, seconds=2, seed=1)
    lines = Path("out/points.jsonl").read_text().splitlines()
    known = json.loads(lines[0]) | {"refused_by": "requests", "level": 99, "refused": 1, "order": 50}
    Path("out/points.jsonl").write_text("".join(f"{line}\n" for line in [*lines, json.dumps(known)]))
    found = await sweep_of(spec, [1, 2, 32], out="out", resume=True, refine=False, seconds=2, seed=1)
    assert [p.purpose for p in found.points][: len(first.points)] == [p.purpose for p in first.points]
    assert not [p for p in found.points if p.purpose == "burst"]


async def test_a_limit_found_midway_makes_what_came_before_be_measured_again():
    """The truth is 5; a full bucket of a minute lets 16 and 32 through for a while."""
    found = await sweep_of({"latency_seconds": 0.1, "requests_per_minute": 3000}, seconds=None)
    assert found.recommend().level == 5
    bursts = {p.level for p in found.points if p.purpose == "burst"}
    assert bursts
    assert bursts <= {p.level for p in found.points if p.purpose == "level"}, "each was measured again"


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
    class InternalServerError(Exception):
        """As the openai SDK raises it after two retries of its own."""

        status_code = 500
        response = SimpleNamespace(headers={}, request=SimpleNamespace(headers={"x-stainless-retry-count": "2"}))

    calls = 0

    async def now_and_then(item):
        nonlocal calls
        calls += 1
        mine = calls
        await asyncio.sleep(0.1)
        if mine % 20 == 0:
            raise InternalServerError

    found = await llmq.sweep(now_and_then, range(5), [2], seconds=5, on_progress=lambda _: None)
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
    found = await sweep_of(spec, [2, 4, 8], title="demo")
    frame = found.frame
    assert list(frame["level"]) == sorted(frame["level"])
    assert frame["goodput"].max() > 4
    text = str(found)
    assert text.splitlines()[0] == "demo"
    assert sum("<- recommended" in line for line in text.splitlines()) == 1
    figure = found.plot()
    labels = {axes.get_ylabel() for axes in figure.axes}
    assert labels == {"calls per second", "429 share", "seconds"}
    assert figure._repr_png_().startswith(b"\x89PNG")
    words = str(found.recommend())
    assert f"llm_queue_concurrency: {found.recommend().level}" in words.splitlines()
