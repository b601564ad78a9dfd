"""What a sweep measures next: on points written by hand, and against providers made of a few lines."""

import math
import random
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from llmq.tune.evidence import judged
from llmq.tune.guard import Extra
from llmq.tune.limits import Separation
from llmq.tune.plan import FAR_ABOVE, MOST_MORE, Step, next_step, steps_left
from llmq.tune.point import Setting
from llmq.tune.recommend import recommend
from llmq.tune.standing import A_LITTLE_SLOWER, ATTEMPTS_TO_PROVE, PACE_SHARE, Bounds
from tests.windows import point, rate

BOUNDS = Bounds()
PACE = 300 * PACE_SHARE
"""Just below 5 calls/s."""


CLEAN = {"seconds": 60.0}
DRIFT = [point(4, 4.0, purpose="drift")]
RATE = [point(8, 5.0, refused=300, rate=rate(500, 100.0)), point(16, 5.0, refused=500, rate=rate(500, 100.0))]


def step(points, order=(4, 8, 16), extra=10, bounds=BOUNDS, seconds=math.inf):
    return next_step(points, list(order), bounds, Extra(extra, seconds))


# --- what was asked for


def test_levels_come_in_the_order_asked_for():
    assert step([], (4, 1, 8)) == Step(Setting(4))
    assert step([point(4, 4.0)], (4, 1, 8)) == Step(Setting(1))
    assert step([point(1, 1.0), point(4, 4.0)], (4, 1, 8)) == Step(Setting(8))
    assert not Step(Setting(4)).extra


def test_what_was_measured_on_a_burst_is_measured_again():
    assert step([point(4, 4.0, purpose="burst")], (4, 8)) == Step(Setting(4))


def test_a_pace_is_another_setting_than_its_level():
    assert step([point(4, 4.0, requests_per_minute=100.0)], (4, 8)) == Step(Setting(4))


def test_levels_far_above_a_refused_one_are_not_measured():
    refused = point(4, 2.0, refused=500, rate=rate())
    asked = (4, 4 * FAR_ABOVE, 4 * FAR_ABOVE - 1, 64)
    assert step([refused], asked) == Step(Setting(4 * FAR_ABOVE - 1))
    assert step([point(4, 4.0)], asked) == Step(Setting(4 * FAR_ABOVE)), "it was not refused"
    client = point(4, 2.0, refused=500, limited_by="client")
    assert step([client], asked) == Step(Setting(4 * FAR_ABOVE)), "who knows"


def test_random_refusals_make_no_level_pointless():
    points = [point(n, float(n), refused=30) for n in (1, 2, 4)]
    assert step(points, (1, 2, 4, 16, 64)) == Step(Setting(16))


def test_without_extra_windows_the_first_level_comes_again_and_that_is_all():
    points = [point(n, float(n)) for n in (4, 8, 16)]
    assert step(points, extra=0) == Step(Setting(4), "drift")
    assert step([*points, *DRIFT], extra=0) is None


def test_drift_comes_last():
    points = [point(n, float(n), **CLEAN) for n in (4, 8, 16)]
    assert step(points) == Step(Setting(16), "more", calls=ATTEMPTS_TO_PROVE, extra=True), "the answer once more"
    assert step(points, seconds=1.0) == Step(Setting(4), "drift"), "there is no time for it"
    points.append(point(16, 16.0, purpose="more"))
    assert step(points) == Step(Setting(4), "drift")
    assert step([*points, *DRIFT]) is None


def test_how_many_windows_are_left():
    assert steps_left([], [1, 2, 4], BOUNDS) == 4
    points = [point(1, 1.0), point(2, 2.0, purpose="burst")]
    assert steps_left(points, [1, 2, 4], BOUNDS) == 3
    assert steps_left([point(n, float(n)) for n in (1, 2, 4)], [1, 2, 4], BOUNDS) == 1
    refused = point(1, 1.0, refused=500, rate=rate())
    assert steps_left([refused], [1, 2, 64], BOUNDS) == 2


# --- a rate


def test_a_rate_is_measured_for_longer_until_it_is_known():
    few = point(8, 5.0, refused=30, attempts=100, rate=rate(70, 14.0))
    found = step([point(4, 4.0), few], (4, 8))
    assert (found.setting, found.purpose, found.extra) == (Setting(8), "more", True)
    assert found.seconds == (250 - 70) / 5
    known = point(8, 5.0, refused=100, rate=rate(250, 50.0))
    assert step([point(4, 4.0), known], (4, 8)).setting.paced


def test_a_known_rate_is_answered_with_a_pace_just_below_it():
    found = step([point(4, 4.0), *RATE])
    assert found.setting.requests_per_minute == PACE
    assert found.calls == ATTEMPTS_TO_PROVE
    needed = PACE / 60  # calls in flight, at 1 s each
    assert needed < found.setting.level == min(16, math.ceil(needed + 3 * math.sqrt(needed)))
    assert step([point(4, 4.0), *RATE[:1]], (4, 8)).setting.level == 8, "no more than was asked for at all"


def test_a_limit_on_tokens_is_paced_in_tokens():
    seen = rate(500, 100.0, tokens=50_000)
    points = [point(4, 4.0), *(point(n, 5.0, refused=300, refused_by="tokens", rate=seen) for n in (8, 16))]
    found = step(points)
    assert found.setting.tokens_per_minute == round(30_000 * PACE_SHARE)
    assert found.setting.requests_per_minute is None


def test_a_pace_that_is_refused_is_tried_slower_then_between():
    points = [point(4, 4.0), *RATE]
    first = point(12, 4.9, refused=100, requests_per_minute=PACE, rate=rate(400, 100.0))
    slower = step([*points, first]).setting.requests_per_minute
    assert slower == math.floor(PACE_SHARE * 240), "just below what it was let in at, itself"
    clean = point(12, 3.9, requests_per_minute=slower)
    between = step([*points, first, clean]).setting.requests_per_minute
    assert slower < between < PACE
    near = point(12, 4.85, requests_per_minute=PACE / 1.01)
    found = step([*points, first, near])
    assert found is None or not found.setting.paced or found.setting.requests_per_minute == near.requests_per_minute


def test_a_pace_that_holds_is_not_tried_again():
    paced = point(12, 4.94, requests_per_minute=PACE, error=0.001)
    found = step([point(4, 4.0), *RATE, paced])
    assert found == Step(Setting(4), "drift") or found.setting.requests_per_minute == PACE


def test_a_higher_limit_that_headers_tell_is_tried_once_the_pace_is_clean():
    """A window that closes for long shows too low a rate: calls wait longer than they need."""
    told = [replace(p, told_per_minute=600.0) for p in RATE]
    clean = point(12, 4.95, requests_per_minute=PACE, error=0.001)
    faster = step([point(4, 4.0), *told, clean], order=(4, 8, 16, 32)).setting
    assert faster.requests_per_minute == 600 * PACE_SHARE
    refused = point(16, 6.0, refused=300, requests_per_minute=600 * PACE_SHARE, rate=rate(600, 100.0))
    between = step([point(4, 4.0), *told, clean, refused]).setting.requests_per_minute
    assert PACE < between < 600 * PACE_SHARE
    same = [replace(p, told_per_minute=305.0) for p in RATE]
    assert step([point(4, 4.0), *same, clean]).setting.requests_per_minute in (None, PACE)


def test_where_the_limit_changes_a_pace_a_little_slower_than_the_edge_is_measured_last():
    changing = [replace(p, rate=rate(500, 100.0, slowest=3.0, fastest=7.0)) for p in RATE]
    edge = point(12, 4.95, requests_per_minute=297.0, error=0.001)
    refused = point(12, 4.9, refused=100, requests_per_minute=299.0, rate=rate(400, 100.0))
    found = step([point(4, 4.0), *changing, edge, refused])
    assert found.setting.requests_per_minute == math.floor(A_LITTLE_SLOWER * 297)
    slower = point(12, 4.9, requests_per_minute=295.0, error=0.001)
    assert step([point(4, 4.0), *changing, edge, refused, slower]).setting.requests_per_minute in (295.0, None)
    assert step([point(4, 4.0), *changing, replace(edge, requests_per_minute=296.0), refused]).setting != found.setting


def test_paces_do_not_fall_without_end():
    refused = [point(12, 0.1, refused=500, requests_per_minute=pace) for pace in (PACE, 200.0, 100.0, 65.0)]
    found = step([point(4, 4.0), *RATE, *refused])
    assert not found.setting.paced


# --- upwards, downwards, more


def concurrency(level, let_in):
    return point(
        level, float(let_in), refused=500, refused_by="concurrency", separation=Separation(1.0, let_in, let_in)
    )  # fmt: skip


def test_a_limit_on_calls_at_once_is_gone_to_directly():
    points = [point(4, 4.0), point(8, 8.0), concurrency(16, 12)]
    assert step(points) == Step(Setting(12), "between", extra=True)
    assert step([*points, point(12, 12.0), point(12, 12.0, purpose="more")]) == Step(Setting(4), "drift")


def test_without_a_known_edge_it_is_halved_down_to_neighbours():
    """Refusals that do not tell how many were let in."""
    no_edge = point(16, 12.0, refused=500, refused_by="concurrency")
    points = [point(4, 4.0), point(8, 8.0), no_edge]
    assert step(points) == Step(Setting(12), "between", extra=True)
    points.append(point(12, 12.0))
    assert step(points).setting == Setting(14)
    points.append(concurrency(14, 12))
    asked = []
    while (found := step([*points])).purpose == "between":
        asked.append(found.setting.level)
        points.append(concurrency(found.setting.level, 12))
    assert asked in ([13], []), "13 is refused: 12 it is"


def test_where_a_bound_breaks_between_two_levels_it_is_looked_for():
    slow = {"service_p95": 3.0, "service_p95_high": 3.1}
    quick = {"service_p95": 1.0, "service_p95_high": 1.1}
    points = [point(4, 4.0, **quick, **CLEAN), point(32, 8.0, **slow)]
    found = step(points, (4, 32), bounds=Bounds(slo_p95=2.0))
    assert found == Step(Setting(18), "between", extra=True)


def test_a_client_limited_level_above_is_nothing_to_look_for():
    points = [point(4, 4.0, **CLEAN), point(8, 8.0, **CLEAN), point(16, 8.0, limited_by="client")]
    points.append(point(8, 8.0, purpose="more"))
    assert step(points) == Step(Setting(4), "drift")


def test_the_knee_is_looked_for_downwards():
    """The truth is 9: 16 is the first that is good enough, and 8 is not."""
    points = [point(n, float(min(n, 9)), error=0.001, **CLEAN) for n in (4, 8, 16, 32)]
    asked = []
    while (found := step(points, (4, 8, 16, 32))).purpose == "between":
        asked.append(found.setting.level)
        points.append(point(found.setting.level, float(min(found.setting.level, 9)), error=0.001, **CLEAN))
    assert asked
    assert all(8 < level < 16 for level in asked)
    assert recommend(points, BOUNDS).level in (9, 10)


def test_an_undecided_comparison_gets_more_samples_so_many_times():
    points = [point(4, 10.0, error=0.05, attempts=600, **CLEAN), point(8, 10.1, error=0.05, attempts=606, **CLEAN)]
    asked = []
    while (found := step(points, (4, 8))).purpose == "more":
        asked.append(found.setting.level)
        assert found.calls > 0
        points.append(point(found.setting.level, 10.0, error=0.1, attempts=100, purpose="more"))
        assert len(asked) < 20
    assert sorted(asked) == [4] * MOST_MORE + [8] * MOST_MORE
    assert found.purpose == "drift"


def test_the_less_certain_of_two_gets_more_samples():
    points = [point(4, 10.0, error=0.03, **CLEAN), point(8, 10.1, error=0.08, attempts=200, **CLEAN)]
    assert step(points, (4, 8)).setting == Setting(8)


def test_a_bound_that_is_not_proven_gets_more_calls():
    points = [point(4, 4.0, attempts=50), point(2, 2.0, attempts=500)]
    found = step(points, (4, 2))
    assert (found.setting, found.purpose) == (Setting(4), "more")
    assert found.calls == ATTEMPTS_TO_PROVE - 50


# --- in the time that is left


def test_one_window_takes_at_most_what_is_left():
    points = [point(n, float(n), **CLEAN) for n in (4, 8, 16)]
    assert step(points, seconds=80.0).most_seconds == 80.0
    assert step(points, seconds=0.0).purpose == "drift"


def test_a_proof_that_cannot_be_had_in_the_time_left_is_not_begun():
    points = [point(4, 4.0, attempts=50, **CLEAN), point(2, 2.0, attempts=500, **CLEAN)]
    missing = ATTEMPTS_TO_PROVE - 50
    assert step(points, (4, 2), seconds=missing / 3.9).calls == missing
    assert step(points, (4, 2), seconds=missing / 4.1).calls == 50, "once more, as any answer"


def test_a_smaller_level_that_cannot_be_told_from_the_answer_in_the_time_left_is_left_alone():
    long = {"seconds": 100.0, "service_mean": 0.5}
    points = [point(8, 9.6, error=0.03, **long), point(16, 10.0, **long), point(16, 10.0, purpose="more", **long)]
    assert (step(points, (8, 16)).setting, step(points, (8, 16)).purpose) == (Setting(8), "more")
    assert step(points, (8, 16), seconds=20.0).purpose == "drift"


def test_a_smaller_level_right_at_the_bound_is_left_alone_after_as_many_calls_as_tell_two_apart():
    long = {"seconds": 100.0, "service_mean": 0.5}
    rest = [point(16, 10.0, **long), point(16, 10.0, purpose="more", **long)]
    many = {"error": 0.01, "attempts": 4000}
    looked = [step([point(8, brings, **many, **long), *rest], (8, 16)).setting for brings in (9.65, 9.75)]
    assert looked[1] == Setting(8), "it looks good enough, so more may show it"
    assert looked[0] != Setting(8), "it looks like too little"
    few = step([point(8, 9.65, error=0.02, attempts=1000, **long), *rest], (8, 16))
    assert few.setting == Setting(8), "too few to look like anything"


def test_a_level_in_between_is_not_begun_where_its_proof_takes_too_long():
    points = [point(4, 1.0, **CLEAN), point(16, 4.0, **CLEAN)]
    assert step(points, (4, 16), seconds=ATTEMPTS_TO_PROVE / 3.9).purpose == "between"
    assert step(points, (4, 16), seconds=ATTEMPTS_TO_PROVE / 4.1).purpose == "drift"


def test_where_nothing_was_refused_the_answer_is_held_for_a_minute():
    points = [point(2, 2.0, **CLEAN), point(4, 4.0, seconds=10.0)]
    found = step(points, (2, 4))
    assert (found.setting, found.purpose, found.seconds) == (Setting(4), "more", 60.0)
    held = point(4, 4.0, seconds=55.0, purpose="more")
    assert step([*points, held], (2, 4)).purpose == "drift", "once is enough, though not all of it was settled"
    looked_at = point(4, 4.0, seconds=10.0, purpose="more")
    assert step([*points, looked_at], (2, 4)).seconds == 60.0, "that was not to hold it"
    assert step([*points, looked_at], (2, 4), seconds=40.0).seconds == 20.0
    assert step([*points, looked_at], (2, 4), seconds=20.0).purpose == "drift", "it was held for as long as there is"


def test_where_calls_cost_nothing_the_answer_is_held_for_longer():
    points = [point(2, 2.0, **CLEAN), point(4, 4.0, seconds=10.0)]
    for calls, seconds in ((100, 60.0), (400, 100.0), (10_000, 300.0)):
        assert next_step(points, [2, 4], BOUNDS, Extra(10, clean_calls=calls)).seconds == seconds


def test_the_next_level_above_the_answer_is_measured_again_where_it_should_have_brought_more():
    crowded = {"service_mean": 2.0, **CLEAN}
    points = [point(2, 4.0, **CLEAN), point(4, 8.0, **CLEAN), point(8, 8.0, **crowded), point(16, 8.0, **crowded)]
    for level in (4, 8):
        found = step(points, (2, 4, 8, 16))
        assert (found.setting, found.purpose) == (Setting(level), "more")
        assert step(points, (2, 4, 8, 16), seconds=ATTEMPTS_TO_PROVE / 8.1).purpose == "drift", (
            "there is no time for it"
        )
        points.append(point(level, 8.0, purpose="more", **CLEAN))
    assert step(points, (2, 4, 8, 16)).purpose == "drift"


def test_an_unsteady_answer_is_measured_again():
    points = [point(2, 2.0, **CLEAN), point(4, 4.0, steady=False, **CLEAN)]
    for _ in range(2):
        assert step(points, (2, 4)).purpose == "more"
        points.append(point(4, 4.0, purpose="more"))
    assert step(points, (2, 4)).purpose == "drift"


def test_below_the_lowest_level_it_is_looked_for_as_well():
    """Its service time may be that of a crowd already, so Little's law says nothing."""
    points = [point(32, 8.0, service_mean=4.0, **CLEAN), point(64, 8.0, service_mean=8.0, **CLEAN)]
    assert step(points, (32, 64)) == Step(Setting(16), "between", extra=True)
    points.append(point(16, 8.0, service_mean=2.0, **CLEAN))
    assert step(points, (32, 64)) == Step(Setting(8), "between", extra=True)


def test_where_nothing_is_feasible_it_goes_down_by_halves():
    points = [point(8, 1.0, refused=500, refused_by="concurrency")]
    assert step(points, (8,)).setting == Setting(4)
    lowest = point(1, 1.0, refused=500, refused_by="concurrency")
    assert step([lowest], (1,)).purpose == "drift", "there is nothing lower"
    assert step([point(8, 1.0, limited_by="client")], (8,)).purpose == "drift", "it is not the provider"


# --- as a whole, against providers made of a few lines


class Synthetic:
    """A provider of calls of 1 s. Windows are as long as asked for; figures are true up to `noise`."""

    def __init__(self, kind, size, noise, seed, named):
        self.kind, self.size, self.noise, self.named = kind, size, noise, named
        self.random = random.Random(seed)

    def point(self, asked, order):
        """What a window shows."""
        setting = asked.setting
        wants = float(setting.level)
        if setting.requests_per_minute is not None:
            wants = min(wants, setting.requests_per_minute / 60)
        brings, ratio, service, more = wants, 0.0, 1.0, {}
        if self.kind == "rate":
            brings = min(wants, self.size)
            ratio = min(0.9, max(0.0, 1 - self.size / wants))
        elif self.kind == "concurrency":
            brings = min(wants, self.size)
            ratio = 0.8 if wants > self.size else 0.0
        elif self.kind == "server":
            brings = min(wants, self.size)
            service = wants / brings
        elif self.kind == "random":
            ratio = 0.03
        seconds = max(10.0 * asked.windows, asked.seconds, asked.calls / brings)
        goodput = max(0.01, brings * (1 + self.noise * self.random.gauss(0, 1)))
        succeeded = max(1, round(goodput * seconds))
        refused = round(succeeded * ratio / (1 - ratio))
        name = self.kind if self.kind == "concurrency" else "requests"
        if refused:
            more["refused_by"] = name if self.named else "unknown"
            if self.kind == "rate":
                more["rate"] = rate(succeeded, seconds)
            if self.kind == "concurrency":
                more["separation"] = Separation(1.0, math.floor(self.size), math.floor(self.size))
        return point(
            setting.level, goodput, error=max(1e-4, self.noise), attempts=succeeded + refused, refused=refused,
            seconds=seconds, order=order, purpose=asked.purpose, service_mean=service, in_flight=brings * service,
            requests_per_minute=setting.requests_per_minute, tokens_per_minute=setting.tokens_per_minute, **more,
        )  # fmt: skip


def driven(provider, order, extra):
    """All windows that are asked for until the plan is done, and its extra ones."""
    points, steps = [], []
    while (asked := next_step(points, order, BOUNDS, Extra(extra - sum(s.extra for s in steps)))) is not None:
        steps.append(asked)
        points.append(provider.point(asked, len(points)))
        assert len(steps) <= len(order) + extra + 1
    return points, steps


PROVIDERS = st.builds(
    Synthetic,
    st.sampled_from(["none", "rate", "concurrency", "server", "random"]),
    st.floats(0.5, 100.0),
    st.sampled_from([0.0, 0.002, 0.01, 0.05, 0.2]),
    st.integers(0, 1000),
    st.booleans(),
)


@settings(max_examples=60)
@given(PROVIDERS, st.lists(st.integers(1, 128), min_size=1, max_size=7, unique=True), st.integers(0, 15))
def test_every_sweep_ends_within_its_budget_and_repeats_nothing(provider, order, extra):
    points, steps = driven(provider, order, extra)
    assert sum(asked.extra for asked in steps) <= extra
    others = [(asked.setting, asked.purpose) for asked in steps if asked.purpose != "more"]
    assert len(others) == len(set(others))
    assert [asked for asked in steps if asked.purpose == "drift"] == [Step(Setting(order[0]), "drift")]
    for setting in {asked.setting for asked in steps}:
        more = sum(s.purpose == "more" and s.setting == setting for s in steps)
        assert more <= MOST_MORE + 1, "one of them to hold the answer"
    levels = [asked.setting.level for asked in steps if asked.purpose == "level"]
    assert set(levels) <= set(order), "asked for"
    recommend(points, BOUNDS)


def test_drift_comes_last_even_where_it_unsettles_the_answer():
    _, steps = driven(Synthetic("none", 1.0, 0.2, 20, False), [14], 3)
    assert [asked.purpose for asked in steps].index("drift") == len(steps) - 1


@settings(max_examples=30)
@given(st.sampled_from(["concurrency", "server"]), st.integers(2, 50), st.booleans())
def test_a_knee_without_noise_is_found(kind, size, named):
    points, _ = driven(Synthetic(kind, size, 0.0, 0, named), [1, 2, 4, 8, 16, 32, 64], 30)
    answer = recommend(points, BOUNDS)
    assert answer.binds == kind
    assert 0.97 * size - 0.01 <= answer.level <= math.ceil(1.13 * size), [p.level for p in judged(points)]


@settings(max_examples=30)
@given(st.floats(2.0, 50.0), st.booleans())
def test_a_rate_without_noise_is_paced(per_second, named):
    points, _ = driven(Synthetic("rate", per_second, 0.0, 0, named), [1, 2, 4, 8, 16, 32, 64], 30)
    answer = recommend(points, BOUNDS)
    assert answer.binds == ("requests" if named else "unknown")
    assert answer.requests_per_minute is not None
    assert 0.95 * per_second <= answer.requests_per_minute / 60 <= per_second
