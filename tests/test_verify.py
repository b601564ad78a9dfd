"""Holding an operating point, in virtual time on asyncio: what the checklist says, and when it cannot say.

A call takes 0.2 s: so N at once bring 5 N a second.
"""

import asyncio
import itertools

import pytest

from llmq import Pipeline, Retry, RuntimeEnv, Settings
from llmq.errors import ConfigError, ProviderError
from llmq.providers.chat import ChatRequest
from llmq.testing import ProviderSpec, SimulatedProvider, VirtualLoop
from llmq.tune.guard import Caps, Stopped
from llmq.tune.point import Setting
from llmq.tune.standing import Bounds
from llmq.tune.verify import verify

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio", {"loop_factory": VirtualLoop}


def asking(provider):
    numbers = itertools.count()

    async def ask(item):
        question = {"role": "user", "content": f"{item} {next(numbers)}"}
        return await provider.complete(ChatRequest("m", [question]))

    return ask


async def held(spec, setting, **options):
    provider = SimulatedProvider(ProviderSpec(**{"latency_seconds": 0.2, "sigma": 0.1, **spec}))
    return await verify(asking(provider), range(10), setting, **options)


def lines(verification):
    """What holds, by the first words of each line of the checklist."""
    short = {"429": "429", "error": "errors", "p95": "p95", "this": "client", "as": "off"}
    return {short[check.what.split()[0]]: check.holds for check in verification.checks}


async def test_a_good_setting_passes():
    found = await held({}, Setting(8))
    assert found.passed
    assert lines(found) == {"429": True, "errors": True, "client": True, "off": True}
    assert found.point.attempts >= 381, "so many without a refusal prove 1 %"
    assert (found.point.level, found.open_items) == (8, 5)
    assert found.on[0] == pytest.approx(40, rel=0.05)
    assert found.off[0] == pytest.approx(25, rel=0.05)
    for middle, low, high in (found.on, found.off):
        assert low < middle < high
    assert len(found.records.attempts) >= found.point.attempts


async def test_a_pace_just_below_a_rate_limit_passes():
    found = await held({"requests_per_minute": 1200, "bucket_seconds": 2}, Setting(6, requests_per_minute=1188))
    assert found.passed, str(found)
    assert found.point.refused == 0
    assert found.on[0] == pytest.approx(19.8, rel=0.02)


async def test_a_rested_bucket_is_emptied_first():
    """A minute deep, it would bring 25 a second with the flag off for as long as that is looked at."""
    found = await held({"requests_per_minute": 1200}, Setting(8, requests_per_minute=1188))
    assert found.off[0] == pytest.approx(20, rel=0.03)
    assert found.passed, str(found)


async def test_a_rested_bucket_is_emptied_at_more_than_a_level_that_is_below_the_rate():
    found = await held({"requests_per_minute": 1200}, Setting(4, requests_per_minute=1188), open_items=8)
    assert found.off[0] == pytest.approx(20, rel=0.05), "and not 40, from a bucket that 4 at once never empty"


async def test_a_level_above_a_rate_limit_does_not_keep_its_429_share():
    found = await held({"requests_per_minute": 1200, "bucket_seconds": 2}, Setting(8))
    assert lines(found)["429"] is False
    assert not found.passed
    assert found.point.share_429_low > 0.01
    assert f"{found.point.refused} of {found.point.attempts} attempts refused" in str(found)


async def test_a_pace_above_the_rate_does_not_keep_its_429_share():
    found = await held({"requests_per_minute": 1200, "bucket_seconds": 2}, Setting(8, requests_per_minute=1400))
    assert lines(found)["429"] is False


@pytest.mark.parametrize(("open_items", "holds"), [(2, True), (32, False)])
async def test_the_flag_off_with_many_items_open_may_be_faster(open_items, holds):
    found = await held({}, Setting(4), open_items=open_items)
    assert lines(found)["off"] is holds
    assert found.passed is holds
    assert found.open_items == open_items
    assert found.off[0] == pytest.approx(5 * open_items, rel=0.05)
    assert f"with the flag off and {open_items} items open" in str(found)


async def test_as_many_as_the_settings_say_are_open_with_the_flag_off():
    RuntimeEnv.initialize(Settings(concurrency=32))
    found = await held({}, Setting(4))
    assert (found.open_items, lines(found)["off"]) == (32, False)


async def test_what_the_calls_cannot_tell_is_undecided_and_does_not_pass():
    """One in a hundred, where at most one in a hundred is allowed; 9 slots against 10 with times that vary a lot."""
    refused = await held({"refusal_ratio": 0.01}, Setting(8))
    assert lines(refused)["429"] is None
    failed = await held({"error_ratio": 0.01, "seed": 1}, Setting(8), retry=Retry(1))
    assert lines(failed)["errors"] is None
    slower = await held({"sigma": 0.5}, Setting(9), open_items=10)
    assert lines(slower)["off"] is None
    for found in (refused, failed, slower):
        assert not found.passed
        assert "[??]" in str(found)
        assert "[NO]" not in str(found)


async def test_calls_that_fail_in_the_end_do_not_pass():
    found = await held({"error_ratio": 0.5}, Setting(8), retry=Retry(1))
    assert lines(found)["errors"] is False
    assert f"{found.point.failed} of {found.point.attempts} calls failed in the end" in str(found)


@pytest.mark.parametrize(("slo_p95", "holds"), [(0.3, True), (0.2, False)])
async def test_a_bound_on_p95_is_a_line_of_its_own(slo_p95, holds):
    found = await held({}, Setting(8), bounds=Bounds(slo_p95=slo_p95))
    assert lines(found)["p95"] is holds
    assert f"p95 under {slo_p95} s" in str(found)


async def test_other_bounds_than_the_usual_are_kept():
    found = await held({"refusal_ratio": 0.04}, Setting(8), bounds=Bounds(max_429_ratio=0.1))
    assert lines(found)["429"] is True
    assert "429 share under 10.0%" in str(found)


async def test_it_is_held_for_as_long_as_it_is_asked():
    found = await held({}, Setting(4), seconds=60)
    assert found.point.window_seconds + found.point.warm_up_seconds >= 60
    assert found.point.attempts == pytest.approx(20 * found.point.window_seconds, rel=0.05)


async def test_the_frame_and_the_text_have_a_line_a_check():
    found = await held({}, Setting(6, requests_per_minute=1000), open_items=3)
    assert list(found.frame.columns) == ["what", "holds", "evidence"]
    assert list(found.frame["holds"]) == [check.holds for check in found.checks]
    head, *rest = str(found).splitlines()
    assert head.startswith("Held 6 at 1000 requests/min calls at once for ")
    assert head.endswith("it keeps what it promises.")
    assert rest == [str(check) for check in found.checks]
    assert all(line.startswith("[ok] ") for line in rest)


async def test_of_a_pipeline_each_stage_counts_as_a_call():
    """Three stages of 0.2 s a service: 4 slots bring 20 stages a second, 2 services with the flag off bring 10."""
    ask = asking(SimulatedProvider(ProviderSpec(latency_seconds=0.2, sigma=0.1)))

    async def draft(item):
        return await ask(item)

    async def polish(item, draft):
        return await ask(item)

    async def check(item, polish):
        return await ask(item)

    found = await verify(Pipeline([draft, polish, check]), range(10), Setting(4), open_items=2)
    assert found.on[0] == pytest.approx(20, rel=0.05)
    assert found.off[0] == pytest.approx(10, rel=0.05)
    assert found.passed
    assert {a.stage for a in found.records.attempts} == {"draft", "polish", "check"}


async def test_nothing_runs_on_afterwards_and_the_queue_in_force_saw_none_of_it():
    RuntimeEnv.initialize(Settings(llm_queue_enabled=True, llm_queue_concurrency=1))
    provider = SimulatedProvider(ProviderSpec(latency_seconds=0.2))
    await verify(asking(provider), range(10), Setting(4))
    before = provider.stats()
    assert before["in_flight"] == 0
    await asyncio.sleep(10)
    assert provider.stats()["requests"] == before["requests"]
    assert RuntimeEnv.instance().llm_queue.records().operations == []


async def test_a_cap_stops_it():
    provider = SimulatedProvider(ProviderSpec(latency_seconds=0.2))
    with pytest.raises(Stopped, match="cap of 100 calls"):
        await verify(asking(provider), range(10), Setting(4), caps=Caps(calls=100))
    assert provider.stats()["requests"] == 100
    assert provider.stats()["in_flight"] == 0


async def test_what_cannot_be_held_is_refused():
    async def fails(item):
        raise ProviderError("no", status_code=401)

    with pytest.raises(ProviderError, match="none of the first"):
        await verify(fails, range(10), Setting(4))
    with pytest.raises(ConfigError, match="at least one item"):
        await verify(fails, [], Setting(4))
