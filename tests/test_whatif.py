"""What a recording lets one say of other levels: the fit by literal records, and round trips in virtual time."""

import asyncio
import heapq
import random
import re
import statistics
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from unittest import mock

import pytest

import llmq
from llmq import LLMQueue, LLMTaskMeta, Retry
from llmq.dialects import RateLimitState
from llmq.errors import ConfigError, ProviderError
from llmq.queue import _COME_BACK_SECONDS, _SPREAD_SECONDS
from llmq.records import AttemptRecord
from llmq.testing import ChatRequest, ProviderSpec, SimulatedProvider
from llmq.tune.fit import COME_BACK_SECONDS, LONGEST_SPREAD_SECONDS, ConcurrencyLimit, fit
from llmq.tune.page import write_html
from llmq.tune.recommend import OperatingPoint
from llmq.tune.sweep import Sweep
from llmq.tune.trace import Trace
from llmq.tune.whatif import Agreement, ClientLoop, FittedProvider, run_what_if, what_if, with_limits
from llmq.virtual import VirtualLoop
from tests.windows import point as window_point

RETRY = Retry()


def admitted(started, ended, operation=1, **more):
    return AttemptRecord(operation, 1, "s", "m", None, None, started, started, ended, "ok", 200, **more)


def refused(started, limit_type="requests", **more):
    more = {"retry_after_seconds": 0.5, **more}
    return AttemptRecord(
        1, 1, "s", "m", None, None, started, started, started + 0.01, "rejected", 429, limit_type, **more
    )


def fitted(attempts):
    return fit(Trace.from_records(sorted(attempts, key=lambda a: a.ended_at), 8))


# The fit


def ten_a_second(start=0.0, burst=5):
    """A bucket of 5, refilled 10 times a second and drained as it fills: a refusal before each refill."""
    found = [admitted(start + 0.001 * n, start + 1.0) for n in range(burst)]
    for n in range(1, 41):
        found += [refused(start + 0.1 * n - 0.01), admitted(start + 0.1 * n, start + 0.1 * n + 1.0)]
    return found


@pytest.mark.parametrize("says", ["requests", "unknown"])
def test_the_rate_is_what_was_let_in_between_refusals(says):
    attempts = [
        refused(a.started_at, says, retry_after_seconds=0.01) if a.outcome == "rejected" else a for a in ten_a_second()
    ]
    model = fitted(attempts)
    (rate,) = model.rates
    assert (rate.kind, rate.source, rate.says) == ("requests", "met", says)
    assert rate.per_minute == pytest.approx(600)
    assert rate.depth == pytest.approx(5 - 10 * 0.09, abs=0.1)
    assert "39 requests let in between the first and the last refusal, 3.9 s apart" in str(rate)
    assert model.concurrency is None


def test_a_refusal_after_a_refusal_tells_nothing_new():
    """The last ones here, long after the last admission, would make 600 a minute 390."""
    model = fitted([*ten_a_second(), *(refused(4.1 + 0.1 * n) for n in range(20))])
    assert model.rates[0].per_minute == pytest.approx(600, rel=0.03)


def test_tokens_are_counted_where_tokens_refused():
    attempts = [
        refused(a.started_at, "tokens")
        if a.outcome == "rejected"
        else admitted(a.started_at, a.ended_at, input_tokens=30, output_tokens=20)
        for a in ten_a_second()
    ]
    (rate,) = fitted(attempts).rates
    assert (rate.kind, rate.per_minute) == ("tokens", pytest.approx(30_000))


def test_one_refusal_is_too_little_to_tell_a_rate():
    model = fitted([admitted(0.1 * n, 0.1 * n + 1) for n in range(20)] + [refused(2.0)])
    assert model.rates == ()
    assert "too few to tell the rate" in model.notes[0]


@pytest.mark.parametrize("says", ["concurrency", "unknown"])
def test_a_limit_on_calls_at_once_is_the_in_flight_at_which_calls_are_refused(says):
    attempts = []
    for n in range(20):  # three at once, ever more seldom; a fourth is refused each time
        base = 2.0 * n + 0.1 * n * n
        attempts += [admitted(base + 0.01 * k, base + 0.7 + 0.3 * k + 0.01 * n) for k in range(3)]
        attempts.append(refused(base + 0.1 + 0.05 * (n % 5), says))
    model = fitted(attempts)
    assert model.concurrency is not None
    assert (model.concurrency.calls, model.concurrency.source, model.concurrency.says) == (3, "met", says)
    assert model.rates == ()


def test_calls_that_start_at_one_moment_were_let_in_before_others_were_refused():
    attempts = [a for n in range(20) for a in (refused(2.0 * n, "concurrency"), *[admitted(2.0 * n, 2.0 * n + 1)] * 2)]
    assert fitted(attempts).concurrency.calls == 2


def test_overload_is_a_fault_and_not_a_limit():
    model = fitted([*(admitted(0.1 * n, 0.1 * n + 1) for n in range(20)), refused(1.05, "overload")])
    assert model.limits == ()
    assert [s.status_code for s in model.samples["s"] if s.failed] == [429]


def told(pairs, limit=600.0, kind="requests"):
    return [
        admitted(0.1 * n, 0.1 * n + 1, limits=(RateLimitState(kind, limit, remaining, reset),))
        for n, (remaining, reset) in enumerate(pairs)
    ]


def test_headers_of_a_bucket_tell_its_rate_and_depth():
    model = fitted(told([(100 - n, n / 10) for n in range(1, 30)]))  # 100 deep, 10 a second
    (rate,) = model.rates
    assert (rate.per_minute, rate.depth, rate.source) == (pytest.approx(600), pytest.approx(100), "told")


def test_headers_of_a_window_tell_its_length():
    model = fitted(told([(200 - 10 * n, 20 - n) for n in range(15)], limit=200.0))
    (rate,) = model.rates
    assert (rate.per_minute, rate.depth) == (pytest.approx(600), 200)


def test_headers_that_tell_only_a_limit_are_taken_for_a_minute():
    (rate,) = fitted(told([(None, None)] * 12)).rates
    assert (rate.per_minute, rate.depth) == (600, 600)


def test_a_limit_of_a_day_is_left_out():
    model = fitted(told([(14_000 - n, 86_000 - n) for n in range(12)], limit=14_400.0))
    assert model.rates == ()
    assert "too long to matter" in model.notes[0]


def test_refusals_are_believed_where_headers_say_something_else():
    attempts = ten_a_second()
    attempts[0].limits = (RateLimitState("requests", 6000.0, None, None),)
    model = fitted(attempts)
    assert model.rates[0].per_minute == pytest.approx(600)
    assert "the refusals are believed" in model.notes[0]
    attempts[0].limits = (RateLimitState("requests", 590.0, None, None),)
    assert fitted(attempts).rates[0].per_minute == 590


def queued(slots, level, calls=400, seed=1, spread=0.2):
    """What a closed loop of `level` calls sees of a server that works on `slots` of 1 s at once."""
    rng = random.Random(seed)
    free, clients, found = [0.0] * slots, [0.001 * n for n in range(level)], []
    for n in range(calls):
        arrival = heapq.heappop(clients)
        departure = max(arrival, heapq.heappop(free)) + max(0.1, rng.gauss(1.0, spread))
        heapq.heappush(free, departure)
        heapq.heappush(clients, departure + 0.001)
        found.append(admitted(arrival, departure, n))
    return found


@pytest.mark.parametrize(("slots", "level"), [(2, 8), (4, 16), (8, 16), (12, 32)])
@pytest.mark.parametrize("seed", range(3))
def test_a_server_that_queues_is_known_by_its_slots(slots, level, seed):
    model = fitted(queued(slots, level, seed=seed))
    assert model.server_slots.slots == slots
    own = [sample.seconds for sample in model.samples["s"]]
    assert sum(own) / len(own) == pytest.approx(1.0, rel=0.03)


@pytest.mark.parametrize("spread", [0.02, 0.2, 0.4])
@pytest.mark.parametrize("seed", range(5))
def test_a_server_that_does_not_queue_is_not_taken_for_one(spread, seed):
    model = fitted(queued(16, 16, seed=seed, spread=spread))
    assert model.server_slots is None


def test_a_busy_client_that_reads_answers_in_batches_is_not_a_server_that_queues():
    """Seen with llmock on a loaded machine: 16 calls of 0.2 s whose answers are read together, late by chance."""
    rng = random.Random(3)
    attempts, at = [], 0.0
    for batch in range(60):
        seconds = 0.2 + rng.expovariate(1 / 0.03)
        attempts += [admitted(at + 0.001 * n, at + seconds + 0.0015 * n, 8 * batch + n) for n in range(8)]
        at += seconds + 0.02
    assert fitted(attempts).server_slots is None


@pytest.mark.parametrize(("seconds", "calls"), [(0.1, 40), (0.1, 200), (0.2, 100)])
def test_equal_times_are_no_sign_of_a_server_that_queues(seconds, calls):
    """Their spreads, 1e-17 s, are of rounding."""
    attempts = [admitted(n * 0.01, n * 0.01 + seconds, n) for n in range(calls)]
    assert fitted(attempts).server_slots is None


@pytest.mark.parametrize(
    ("told_seconds", "expected"),
    [([], "none"), ([0.25, 0.75], "exact"), ([1.0, 2.0], "whole"), ([60.0, 60.0], 60.0)],
)
def test_how_refusals_say_when_to_come_back(told_seconds, expected):
    attempts = [refused(n, retry_after_seconds=s) for n, s in enumerate(told_seconds or [None])]
    assert fitted([*attempts, admitted(0, 1)]).retry_after == expected


def test_given_limits_stand_in_place_of_met_ones():
    model = fitted(ten_a_second())
    changed = with_limits(model, requests_per_minute=1200, max_concurrency=3)
    (rate,) = changed.rates
    assert (rate.per_minute, rate.source) == (1200, "given")
    assert rate.depth == pytest.approx(2 * model.rates[0].depth)
    assert changed.concurrency == ConcurrencyLimit(3, "given", "", "concurrency")
    assert "its bucket holds 0.41 s' worth as recorded" in str(rate)
    assert "a minute's worth" in str(with_limits(fitted([admitted(0, 1)]), requests_per_minute=60).rates[0])
    for bad in ({"requests_per_minute": 0}, {"tokens_per_minute": float("nan")}, {"max_concurrency": 0}):
        with pytest.raises(ConfigError, match="must be"):
            with_limits(model, **bad)
    with pytest.raises(ConfigError, match="no tokens"):
        with_limits(model, tokens_per_minute=100)


@pytest.mark.parametrize("limit", [{"requests_per_minute": 1e-300}, {"tokens_per_minute": 1000}])
def test_a_rate_of_less_than_a_call_a_minute_is_refused(limit):
    model = fitted([admitted(n, n + 1, n, output_tokens=1500) for n in range(20)])
    with pytest.raises(ConfigError, match="less than one call a minute"):
        with_limits(model, **limit)


# Round trips in virtual time


class QueueingProvider:
    """Works on `slots` calls at once, in order of arrival."""

    def __init__(self, slots, spec):
        self.slots = asyncio.Semaphore(slots)
        self.provider = SimulatedProvider(spec)

    async def complete(self, request):
        async with self.slots:
            return await self.provider.complete(request)


def in_virtual_time(main):
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main())


def make(spec):
    spec = dict(spec)
    slots = spec.pop("queueing", None)
    spec = ProviderSpec(**spec)
    return SimulatedProvider(spec) if slots is None else QueueingProvider(slots, spec)


def asking(provider):
    count = iter(range(10**9))

    async def ask(_=None):
        return await provider.complete(ChatRequest("m", [{"role": "user", "content": f"{next(count)}"}], None, "s"))

    return ask


async def closed_loop(ask, level, calls):
    """What a queue that is never empty records of so many calls."""
    queue = LLMQueue(level, telemetry=None)
    left = iter(range(calls))

    async def work():
        for _ in left:
            with suppress(ProviderError):
                await queue.submit(ask, meta=LLMTaskMeta("s"), retry=RETRY)

    await asyncio.gather(*(work() for _ in range(2 * level)))
    return queue.records()


def record(spec, level, calls=500):
    async def main():
        return await closed_loop(asking(make(spec)), level, calls)

    return Trace.from_records(in_virtual_time(main), level)


def measured(spec, levels, seconds):
    async def main():
        return await llmq.sweep(
            asking(make(spec)), range(10), levels, seconds=seconds, refine=False, on_progress=lambda _: None
        )

    return by_level(in_virtual_time(main).points)


def by_level(points):
    return {p.level: p for p in points if p.purpose == "level"}


def assert_close(found, truth):
    """Goodput within 5 %, 429 share within 2 points, at each level."""
    points = found.judged()
    assert {p.level for p in points} == set(truth)
    for point in points:
        real = truth[point.level]
        seen = f"{point.level}: {point.goodput:.2f}/s, {point.share_429:.3f}"
        seen += f"; measured {real.goodput:.2f}/s, {real.share_429:.3f}"
        print(seen)
    for point in points:
        real = truth[point.level]
        assert point.goodput == pytest.approx(real.goodput, rel=0.05), point.level
        assert point.share_429 == pytest.approx(real.share_429, abs=0.02), point.level


def asked(trace, levels, **options):
    options = {"refine": False, "calls": 1000, **options}
    return asyncio.run(what_if(trace, levels, **options))


SHAPES = {
    "latency": ({"latency_seconds": 0.2}, 32, [2, 4, 8, 16, 24]),
    "requests": ({"latency_seconds": 0.2, "requests_per_minute": 3000, "bucket_seconds": 1}, 16, [2, 4, 6, 24, 32]),
    "concurrency": ({"latency_seconds": 0.2, "max_concurrency": 12}, 16, [4, 8, 12, 24, 32]),
    "queueing": ({"latency_seconds": 0.2, "queueing": 8}, 16, [2, 4, 8, 12, 32]),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_what_if_agrees_with_what_is_measured(shape):
    spec, level, others = SHAPES[shape]
    found = asked(record(spec, level), others)
    truth = measured(spec, others, 60)
    assert found.unknown_levels == ()
    assert_close(found, truth)


@pytest.fixture(scope="module")
def unlimited():
    """500 calls of 0.2 s, 8 at once, that met no limit."""
    return record({"latency_seconds": 0.2}, 8)


def test_above_what_the_recording_shows_it_says_unknown(unlimited):
    found = asked(unlimited, [4, 8, 9, 64])
    assert (found.unknown_levels, found.unknown_above) == ((9, 64), 8)
    assert {p.level for p in found.points} == {4, 8}
    assert "64 at once: unknown" in str(found)
    answer = found.recommend()
    assert answer.level is None
    assert "What is best may lie above 8 calls at once. Nothing is known of 9, 64 at once" in str(answer)
    assert "Record a run at 16 calls at once" in str(answer)
    frame = found.frame.groupby("level").first()
    assert list(frame["known"]) == [True, True, False, False]
    assert frame["goodput"].isna().tolist() == [False, False, True, True]
    with pytest.raises(ConfigError):
        found.apply("app.yaml")


def test_with_nothing_known_nothing_is_recommended(unlimited):
    found = asked(unlimited, [32])
    assert (found.points, found.recommend().level) == ([], None)
    assert "Nothing is known of 32 at once" in str(found.recommend())
    assert "32 at once: unknown" in str(found)


def test_a_known_best_level_is_recommended_beside_unknown_ones(unlimited):
    """A bound on latency that no level keeps has nothing to do with levels that are not known."""
    found = asked(unlimited, [2, 16])
    answer = replace(OperatingPoint(2, "slo", "At 4 the p95 breaks the bound."), notes=("one",))
    with mock.patch.object(Sweep, "recommend", return_value=answer):
        told = found.recommend()
    assert told.level == 2
    assert told.notes[:2] == (found.recommend().reason.split(" calls at once. ", 1)[1], "one")


def test_a_limit_that_is_told_in_headers_makes_higher_levels_known():
    trace = record({"latency_seconds": 0.2}, 8)
    for attempt in trace.attempts:
        attempt.limits = (RateLimitState("requests", 30_000.0, None, None),)
    found = asked(trace, [4, 64])
    assert found.unknown_levels == ()
    (rate,) = found.model.rates
    assert (rate.source, rate.per_minute) == ("told", pytest.approx(30_000))
    assert "64 calls in flight were simulated, 8 were seen" in str(found.recommend())


def test_a_given_limit_makes_known_what_was_not_met(unlimited):
    found = asked(unlimited, [64], requests_per_minute=1500)
    (point,) = found.judged()
    assert point.goodput == pytest.approx(25, rel=0.03)
    assert point.share_429 > 0.02
    found = asked(unlimited, [6, 64], max_concurrency=4)
    assert found.unknown_levels == ()
    assert all(p.share_429 > 0 for p in found.points)
    found = asked(unlimited, [8, 64], max_concurrency=32)
    assert found.unknown_levels == (64,)


def test_the_operating_point_under_a_rate_has_a_pace(unlimited):
    found = asked(unlimited, [2, 8], requests_per_minute=1500, refine=True)
    answer = found.recommend()
    assert answer.binds == "requests"
    assert answer.requests_per_minute == pytest.approx(1500, rel=0.03)
    assert 5 <= answer.level <= 8
    assert "There the simulation differs from it by" in str(answer)
    write_html(found, "report.html")
    assert "There the simulation differs from it by" in Path("report.html").read_text()
    found.plot().savefig("sweep.png")


def test_the_error_against_the_recording_is_stated():
    found = asked(record({"latency_seconds": 0.2, "sigma": 0.2}, 8), [4])
    assert abs(found.agreement.goodput_error) < 0.03
    assert abs(found.agreement.p95_error) < 0.03
    assert found.agreement.share_429_error == 0
    assert f"a recording at 8 at once. There the simulation differs from it by: {found.agreement}." in str(found)


def test_the_stated_error_is_of_the_steady_state_and_of_the_limits_met():
    """The burst at the beginning brings goodput that no level keeps up; a given limit is no part of the recording."""
    trace = record({"latency_seconds": 0.2, "requests_per_minute": 1500, "bucket_seconds": 4}, 16)
    found = asked(trace, [16], requests_per_minute=600)
    assert found.agreement.recorded.goodput == pytest.approx(25, rel=0.05)
    assert abs(found.agreement.goodput_error) < 0.05
    assert abs(found.agreement.share_429_error) < 0.03


def test_a_recording_that_lived_on_a_burst_says_so(unlimited):
    attempts = [replace(a, limits=(RateLimitState("requests", 1500.0, None, None),)) for a in unlimited.attempts]
    found = asked(Trace(8, attempts), [4])
    assert "it lived on what a rested bucket held" in str(found.recommend())


def test_a_recording_that_did_not_fill_its_level_says_so():
    trace = record({"latency_seconds": 0.2}, 4)
    found = asked(Trace(16, trace.attempts), [4])
    assert "its own pace was the limit" in str(found.recommend())


def test_it_works_from_a_running_loop_that_goes_on(unlimited):
    async def main():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        found = await what_if(unlimited, [4], calls=300, refine=False)
        ticking.cancel()
        return found, ticks

    found, ticks = asyncio.run(main())
    assert {p.level for p in found.points} == {4}
    assert ticks > 1


def in_late_time(model, asks, level=1, seed=0):
    """The seconds that each of so many calls takes, or what it raised."""

    async def main():
        provider = FittedProvider(model, seed=seed)
        questions = provider.questions()

        async def ask():
            start = asyncio.get_running_loop().time()
            try:
                await provider.answer(next(questions))
            except ProviderError as error:
                return error
            return round(asyncio.get_running_loop().time() - start, 6)

        return [outcome for _ in range(asks) for outcome in await asyncio.gather(*(ask() for _ in range(level)))]

    return on_client_loop(main)


def on_client_loop(main, late_seconds=0.0, seed=1):
    with asyncio.Runner(loop_factory=lambda: ClientLoop(late_seconds, seed)) as runner:
        return runner.run(main())


def test_failures_come_as_they_were_recorded():
    model = fit(record({"latency_seconds": 0.2, "error_ratio": 0.1}, 8))
    found = in_late_time(model, 500)
    assert Counter(getattr(outcome, "status_code", None) for outcome in found)[500] == pytest.approx(50, abs=25)


def test_each_stage_has_its_own_times():
    attempts = [admitted(4.0 * n, 4.0 * n + 1.0, n) for n in range(20)]
    for attempt in attempts[10:]:
        attempt.stage, attempt.ended_at = "t", attempt.started_at + 3.0
    provider = FittedProvider(fitted(attempts), seed=0)
    asked_for = Counter(question.stage for question in islice(provider.questions(), 19))
    assert asked_for == {"s": 9, "t": 10}  # the first call met a cold connection
    assert Counter(in_late_time(fitted(attempts), 19)) == {1.0: 9, 3.0: 10}


def test_a_request_is_decided_when_it_has_arrived():
    """A refusal takes 0.2 s, so a request arrives after 0.1 s: the second is refused if the first arrived before it."""
    model = replace(
        fitted([admitted(0.0, 1.0)]), refusal_seconds=(0.2,), concurrency=ConcurrencyLimit(1, "met", "", "")
    )

    async def main():
        provider = FittedProvider(model, seed=0)
        questions = provider.questions()
        first = asyncio.create_task(provider.answer(next(questions)))
        await asyncio.sleep(0.95)
        start = asyncio.get_running_loop().time()
        await provider.answer(next(questions))  # sent while the first runs, arrived after it ended
        with suppress(ProviderError):
            await asyncio.gather(first, provider.answer(next(questions)), provider.answer(next(questions)))
        return asyncio.get_running_loop().time() - start

    assert on_client_loop(main) == pytest.approx(1.0 + 0.2)


def spread_starts(late, level=10, rounds=40, busy=0):
    """After each hold of 0.1 s six starts, 10 ms apart, each late by the next of `late` (seconds)."""
    found, late, at = [], cycle(late), 0.0
    for _ in range(rounds):
        found += [admitted(at - 0.5, at + 4.0) for _ in range(busy)]
        found.append(refused(at, retry_after_seconds=0.1))  # ends after 0.01 s
        start = at + 0.11
        for _ in range(6):
            found.append(admitted(start, start + 0.5))
            found[-1].submitted_at = at
            start += 0.01 + next(late)
        at += 5.0
    return sorted(found, key=lambda a: a.ended_at), level


def test_how_late_the_client_is_shows_in_starts_that_are_spread_after_a_hold():
    attempts, level = spread_starts([0.001, 0.005])
    assert fit(Trace.from_records(attempts, level)).late_seconds == pytest.approx(0.0026)  # of five gaps
    attempts, level = spread_starts([0.001, 0.005], rounds=3)
    assert fit(Trace.from_records(attempts, level)).late_seconds == 0  # too few
    attempts, level = spread_starts([0.001, 0.005], busy=10)
    assert fit(Trace.from_records(attempts, level)).late_seconds == 0  # no slot was free


def interrupted_spreads(ahead, withheld, level=10):
    """After each hold of 0.1 s a start, which is refused. The next is due so many seconds before that is told, and made
    if they are more than `withheld`."""
    found, at = [], 0.0
    withheld = withheld if isinstance(withheld, cycle) else cycle([withheld])
    for seconds in ahead:
        first, due = at + 0.12, at + 0.13
        found += [refused(at, retry_after_seconds=0.1), refused(first, retry_after_seconds=0.1)]  # told after 0.01 s
        found[-1].ended_at = due + seconds
        found += [admitted(start, start + 0.5) for start in ([due] if seconds > next(withheld) else []) + [at + 1.0]]
        for attempt in found[-3:]:
            attempt.submitted_at = at
        at += 5.0
    return sorted(found, key=lambda a: a.ended_at), level


def test_how_busy_the_client_is_shows_in_starts_that_were_due_just_before_a_refusal_was_told():
    ahead = [0.0002 * n for n in range(1, 50)]
    assert fit(Trace.from_records(*interrupted_spreads(ahead, 0.0031))).busy_seconds == pytest.approx(0.003)
    assert fit(Trace.from_records(*interrupted_spreads(ahead, 0.0))).busy_seconds == 0
    assert fit(Trace.from_records(*interrupted_spreads(ahead[:10], 0.003))).busy_seconds == 0  # too few
    made_or_not = interrupted_spreads(ahead, cycle([0.0, 1.0]))
    assert fit(Trace.from_records(*made_or_not)).busy_seconds < 0.0005  # whenever they were due


def test_a_busy_client_is_found_again():
    """It works for 4 ms on each refusal, and wakes for nothing else meanwhile."""
    spec = {"latency_seconds": 0.3, "requests_per_minute": 3000, "bucket_seconds": 0.5, "refusal_seconds": 0.01}

    async def main():
        ask = asking(make(spec))

        async def busy():
            try:
                return await ask()
            except ProviderError:
                asyncio.get_running_loop().jump(0.004)
                raise

        return await closed_loop(busy, 20, 1000)

    trace = Trace.from_records(on_client_loop(main), 20)
    found = asked(trace, [20], calls=4000)  # of 1,000 the simulation without it agrees as well now and then
    assert found.model.busy_seconds == pytest.approx(0.004, abs=0.001)
    assert abs(found.agreement.share_429_error) < 0.02


def test_while_the_client_is_at_work_on_a_refusal_it_does_nothing_else():
    """The refusal comes after 0.2 s; for the last 0.05 of them the client is at work on it."""
    model = replace(
        fitted([admitted(0.0, 1.0)]),
        refusal_seconds=(0.2,),
        busy_seconds=0.05,
        concurrency=ConcurrencyLimit(1, "met", "", ""),
    )

    async def main():
        loop = asyncio.get_running_loop()
        provider = FittedProvider(model, seed=0)
        questions = provider.questions()
        first = asyncio.create_task(provider.answer(next(questions)))
        await asyncio.sleep(0.2)
        start = loop.time()
        woken = {}
        for seconds in (0.14, 0.16, 0.21):
            loop.call_later(seconds, lambda seconds=seconds: woken.setdefault(seconds, loop.time() - start))
        with pytest.raises(ProviderError):
            await provider.answer(next(questions))
        refused_after = loop.time() - start
        await first
        return woken, refused_after

    woken, refused_after = on_client_loop(main)
    assert refused_after == pytest.approx(0.2)
    assert woken == pytest.approx({0.14: 0.14, 0.16: 0.2, 0.21: 0.21})


@pytest.mark.parametrize(("level", "calls", "rate"), [(3, 150, 300), (8, 400, 600), (16, 500, 300)])
def test_in_virtual_time_no_client_is_late(level, calls, rate):
    spec = {"latency_seconds": 0.1, "requests_per_minute": rate, "bucket_seconds": 2}

    async def main():
        queue, ask = LLMQueue(level, telemetry=None), asking(make(spec))
        work = (queue.submit(ask, meta=LLMTaskMeta("s"), retry=RETRY) for _ in range(calls))
        await asyncio.gather(*work, return_exceptions=True)
        return queue.records()

    trace = Trace.from_records(in_virtual_time(main), level)
    assert sum(a.outcome == "rejected" for a in trace.attempts) > 100
    assert fit(trace).late_seconds < 1e-4


def test_a_slow_client_is_left_out_where_it_makes_the_agreement_worse():
    spec = {"latency_seconds": 0.3, "requests_per_minute": 3000, "bucket_seconds": 0.5, "refusal_seconds": 0.01}
    trace = record(spec, 20, calls=1000)
    with mock.patch("llmq.tune.fit.fit_busy_seconds", return_value=0.03):
        found = asked(trace, [20])
    assert (found.model.busy_seconds, found.model.late_seconds) == (0, 0)
    assert found.agreement.worst < 0.02, "with it more than 0.05"


def test_a_refused_call_is_back_when_the_queue_says():
    assert (LONGEST_SPREAD_SECONDS, COME_BACK_SECONDS) == (_SPREAD_SECONDS, _COME_BACK_SECONDS)


def test_how_late_a_client_was_is_found_again():
    """What the fit alone reads is too much, since not every hold is as long as it takes it for."""
    spec = {"latency_seconds": 0.3, "requests_per_minute": 3000, "bucket_seconds": 0.5, "refusal_seconds": 0.01}

    async def main():
        return await closed_loop(asking(make(spec)), 20, 1000)

    trace = Trace.from_records(on_client_loop(main, late_seconds=0.003), 20)
    found = asked(trace, [20])
    print(fit(trace).late_seconds, found.model.late_seconds, found.agreement)
    assert found.model.late_seconds == pytest.approx(0.003, abs=0.0007)
    assert abs(found.agreement.share_429_error) < 0.02


def test_timers_are_late_by_the_mean_that_was_recorded_but_not_those_of_the_provider():
    async def main():
        loop = asyncio.get_running_loop()
        late = []
        for _ in range(2000):
            before = loop.time()
            await asyncio.sleep(0.1)
            late.append(loop.time() - before - 0.1)
        before = loop.time()
        for _ in range(2000):
            await loop.on_time(0.1)
        return late, loop.time() - before

    late, on_time = on_client_loop(main, late_seconds=0.003)
    assert statistics.fmean(late) == pytest.approx(0.003, rel=0.05)
    assert 0.0 <= min(late) < max(late) <= 0.006
    assert on_time == pytest.approx(200.0)


def test_who_is_cancelled_does_not_wait_for_the_provider():
    async def main():
        loop = asyncio.get_running_loop()
        asleep = asyncio.create_task(loop.on_time(0.1))
        loop.call_later(0.1, asleep.cancel)  # at the very moment when it is over
        with suppress(asyncio.CancelledError):
            await asleep
        await asyncio.sleep(0.1)
        return loop.time()

    with mock.patch("asyncio.BaseEventLoop.call_exception_handler") as told:
        assert on_client_loop(main) == pytest.approx(0.2)
    told.assert_not_called()


def test_what_cannot_be_simulated_is_refused():
    trace = record({"latency_seconds": 0.2}, 2, calls=20)
    for levels in ([], [0], ["8"]):
        with pytest.raises(ConfigError, match="levels are calls at once"):
            asked(trace, levels)
    with pytest.raises(ConfigError, match="too few to simulate"):
        asked(trace, [1], calls=1)
    with pytest.raises(ConfigError, match="no call succeeded"):
        asked(Trace(1, []), [1])


def test_from_a_file_without_a_loop():
    trace = record({"latency_seconds": 0.2}, 8, calls=100)
    trace.write("trace.jsonl")
    found = run_what_if("trace.jsonl", [2, 4], requests_per_minute=2000, calls=200, refine=False)
    assert {p.level for p in found.points} == {2, 4}
    assert "2000 requests per minute" in str(found)


@pytest.mark.parametrize("level", [1, 7])
def test_a_level_below_what_was_in_flight_is_refused(level, unlimited):
    with pytest.raises(ConfigError, match=f"says level={level}, and 8 calls were in flight at once"):
        asked(Trace(level, unlimited.attempts), [2])


def test_a_level_far_above_what_was_in_flight_is_not_simulated(unlimited):
    found = asked(Trace(10**9, unlimited.attempts), [4])
    assert found.agreement.simulated.level == 8
    assert abs(found.agreement.goodput_error) < 0.05


def test_calls_that_take_no_time_are_refused():
    with pytest.raises(ConfigError, match="took 0 s"):
        asked(Trace(1, [admitted(0.1 * n, 0.1 * n, n) for n in range(50)]), [1])


def agreement(simulated=100.0, recorded=100.0, succeeded=100, **more):
    more = {"service_p50": 1.0, "service_p95": 2.0, **more}
    points = (
        window_point(8, recorded, succeeded=succeeded, **more),
        window_point(8, simulated, service_p50=1.0, service_p95=2.0),
    )
    return Agreement(*points)


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (agreement(), None),
        (agreement(119.0), None),
        (agreement(121.0), r"differs from the recorded one by \+21.0%, and 20% is the most"),
        (agreement(79.0), "differs from the recorded one by -21.0%"),
        (agreement(succeeded=29), "29 successful calls .* too few .*; 30 are needed"),
        (agreement(service_p95=None), "cannot be told .*p95 unknown"),
    ],
)
def test_nothing_is_recommended_where_the_error_is_unknown_or_large(found, why, unlimited):
    assert (found.doubt is None) if why is None else re.search(why, found.doubt)
    swept = replace(asked(unlimited, [4]), agreement=found)
    answer = swept.recommend()
    assert (answer.next_steps == ("Record more calls: a longer run, with a queue that is never empty.",)) == bool(why)
    if why:
        assert answer.level is None
        assert "nan" not in str(answer)


def test_what_is_simulated_is_not_logged(unlimited, caplog):
    caplog.set_level("INFO", "llmq")
    asked(unlimited, [8], requests_per_minute=60)
    assert caplog.records == []
    llmq.logs.logger.info("told")
    assert caplog.messages == ["told"]
