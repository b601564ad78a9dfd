"""What the windows of a sweep say together, on points written by hand."""

import dataclasses
import math

import pytest

from llmq.tune.evidence import Limit, drift, judged, limit_found, rate_found
from llmq.tune.limits import RateSeen, Separation
from llmq.tune.point import Setting
from llmq.tune.statistics import wilson
from tests.windows import point, rate

CLEAR, NOT_CLEAR = Separation(0.99, 12, 12), Separation(0.6, 30, 25)


def test_what_a_limit_lets_in_at_its_slowest():
    seen = RateSeen(400, 0, 100.0, 9, 3.0, 5.0)
    assert Limit("requests", 0.3).lets_in == 0
    assert Limit("concurrency", 0.3, most=8).lets_in == 0
    assert Limit("requests", 0.3, dataclasses.replace(seen, slowest=None)).lets_in == 4
    assert Limit("requests", 0.3, seen).lets_in == 3
    assert Limit("requests", 0.3, seen, span=(2.0, 5.0)).lets_in == 2


def test_windows_of_one_setting_are_one_point():
    first = point(
        4, 4.0, attempts=50, refused=10, seconds=10.0, order=1, goodput_low=3.0, goodput_high=5.0, in_flight=3.0,
        outcomes={"ok": 40, "429 requests": 10}, cost=1.0, service_p95=2.0, ok_blocks=(20, 20), retried=3,
    )  # fmt: skip
    second = point(
        4, 7.0, attempts=210, refused=0, seconds=30.0, order=5, purpose="more", goodput_low=6.0, goodput_high=8.0,
        in_flight=4.0, outcomes={"ok": 208, "5xx": 2}, cost=2.5, service_p95=1.5, ok_blocks=(100, 110), steady=False,
        failed=2, longest_hold_seconds=9.0,
    )  # fmt: skip
    (found,) = judged([first, second])
    assert (found.setting, found.purpose, found.order) == (Setting(4), "level", 5)
    assert (found.window_seconds, found.attempts, found.refused, found.succeeded, found.failed) == (40, 260, 10, 250, 2)
    assert (found.goodput, found.attempt_rate, found.in_flight) == (6.25, 6.5, 3.75)
    half = math.hypot(1.0 * 10, 1.0 * 30) / 40  # counts' intervals, in quadrature
    assert (found.goodput_low, found.goodput_high) == pytest.approx((6.25 - half, 6.25 + half))
    assert (found.share_429, found.share_429_low, found.share_429_high) == (10 / 260, *wilson(10, 260))
    assert (found.error_share, found.error_share_high) == (2 / 252, wilson(2, 252).high)
    assert found.outcomes == {"ok": 248, "429 requests": 10, "5xx": 2}
    assert (found.cost, found.retried, found.ok_blocks) == (3.5, 3, (20, 20, 100, 110))
    assert found.service_p95 == 1.5, "of the window with more calls"
    assert (found.steady, found.longest_hold_seconds, found.refused_by) == (False, 9.0, "requests")


def test_more_windows_narrow_the_interval():
    windows = [point(4, 4.0) for _ in range(4)]
    assert judged(windows)[0].goodput_error == pytest.approx(windows[0].goodput_error / 2)


def test_bursts_are_not_judged_and_settings_stay_apart_in_order():
    points = [
        point(8, 8.0, requests_per_minute=300.0),
        point(16, 80.0, purpose="burst"),
        point(8, 8.0),
        point(2, 2.0),
        point(8, 8.0, requests_per_minute=200.0),
        point(2, 2.0, purpose="drift"),
    ]
    found = [(p.level, p.requests_per_minute) for p in judged(points)]
    assert found == [(2, None), (8, None), (8, 200.0), (8, 300.0)]
    assert judged([]) == []


def test_rates_of_windows_are_pooled():
    points = [
        point(8, 5.0, refused=300, rate=rate(100, 20.0, tokens=7, onsets=4, slowest=4.0, fastest=6.0)),
        point(16, 5.0, refused=300, rate=rate(300, 40.0, tokens=3, onsets=9, slowest=7.0, fastest=8.0)),
        point(16, 9.0, refused=300, purpose="burst", rate=rate(100, 40.0)),
    ]
    assert rate_found([points[0]]) == points[0].rate
    assert rate_found(points[:2]) == RateSeen(400, 10, 60.0, 13, 4.0, 8.0)


def test_a_busy_client_is_asked_for_a_rate_only_for_want_of_others():
    busy = point(64, 5.0, refused=700, rate=rate(900, 100.0), limited_by="client")
    calm = point(16, 5.0, refused=300, rate=rate(500, 100.0))
    assert rate_found([busy, calm]).per_second == 5.0
    assert rate_found([busy]).per_second == 9.0


@pytest.mark.parametrize("seen", [rate(19, 10.0), rate(100, 0.9), None])
def test_a_rate_needs_calls_and_seconds(seen):
    assert rate_found([point(16, 5.0, refused=300, rate=seen)]) is None


def test_what_goes_beyond_the_rate_found_is_told():
    """At 5 calls/s: 6.25 for certain is a fifth over it; 5.1 +- 0.1 is not for certain."""
    refused = point(16, 5.0, refused=300, rate=rate(500, 100.0))
    surely, hardly, below, _ = judged(
        [point(6, 6.5, error=0.125 / 6.5), point(7, 5.1, error=0.02), point(8, 4.0), refused]
    )
    assert surely.over_rate == pytest.approx(0.2)
    assert (hardly.over_rate, below.over_rate) == (0.0, 0.0)
    assert judged([point(6, 6.5)])[0].over_rate == 0.0, "no rate, nothing over it"


def test_no_refusals_or_hardly_any_show_no_limit():
    assert limit_found([]) is None
    assert limit_found([point(4, 4.0), point(8, 8.0)]) is None
    assert limit_found([point(4, 4.0), point(8, 8.0, refused=2)]) is None


@pytest.mark.parametrize(
    ("refused_by", "kind"), [("requests", "requests"), ("tokens", "tokens"), (None, "unknown"), ("days", "unknown")]
)
def test_a_limit_on_a_rate_is_called_what_refusals_call_it(refused_by, kind):
    points = [point(4, 4.0), point(16, 5.0, refused=600, refused_by=refused_by, rate=rate(), separation=NOT_CLEAR)]
    found = limit_found(points)
    assert (found.kind, found.rate, found.most) == (kind, rate(), None)
    assert found.share == 600 / 2000


def test_what_most_refusals_say_counts():
    points = [
        point(4, 4.0, refused=10, refused_by="tokens"),
        point(8, 5.0, refused=400, refused_by="requests"),
        point(16, 5.0, refused=300, refused_by="tokens"),
    ]
    assert limit_found(points).kind == "requests"


def test_a_limit_on_calls_at_once_by_its_name():
    points = [point(8, 8.0), point(16, 12.0, refused=600, refused_by="concurrency", separation=CLEAR)]
    found = limit_found(points)
    assert (found.kind, found.most, found.rate) == ("concurrency", 12, None)


def test_refusals_without_a_name_that_depend_on_what_is_in_flight_are_a_limit_on_it():
    points = [point(8, 8.0), point(16, 12.0, refused=600, refused_by="unknown", separation=CLEAR)]
    assert limit_found(points).kind == "concurrency"
    at_32 = point(32, 12.0, refused=800, refused_by="unknown", separation=dataclasses.replace(CLEAR, let_in=13))
    assert limit_found([*points, at_32]).kind == "concurrency", "the same limit at each level"
    elsewhere = dataclasses.replace(at_32, separation=dataclasses.replace(CLEAR, let_in=30))
    assert limit_found([*points, elsewhere]).kind == "unknown", "no one limit: a rate whose calls came in bursts"
    unclear = dataclasses.replace(at_32, separation=NOT_CLEAR)
    assert limit_found([*points, unclear]).kind == "unknown"


def test_what_names_a_rate_is_one_however_separate_it_looks():
    points = [point(8, 8.0), point(16, 12.0, refused=600, refused_by="requests", rate=rate(), separation=CLEAR)]
    assert limit_found(points).kind == "requests"


def test_refusals_that_do_not_grow_with_the_level_are_random():
    """3 % at every level, while goodput doubles."""
    points = [point(n, float(n), refused=30) for n in (2, 4, 8, 16)]
    found = limit_found(points)
    assert (found.kind, found.share) == ("random", 0.03)
    growing = [point(n, float(n), refused=k) for n, k in ((2, 5), (4, 10), (8, 25), (16, 80))]
    assert limit_found(growing).kind == "requests"
    assert limit_found(points[:1]).kind == "requests", "one level shows no trend"


def test_refusals_far_below_what_is_let_in_are_random_even_if_there_seem_to_be_more_above():
    """0.35 % at 1 to 4 at once, 0.6 % above: a trend at 95 %, as is bound to be seen in one of many sweeps."""

    def found(*refused, by="unknown"):
        goodput = (0.5, 1.0, 2.0, 4.0, 8.0, 11.9, 11.8)
        levels = zip((1, 2, 4, 8, 16, 32, 64), goodput, refused, strict=True)
        return limit_found([point(n, g, refused=k, attempts=2000, refused_by=by) for n, g, k in levels]).kind

    assert found(8, 8, 5, 8, 14, 12, 12) == "random"
    assert found(8, 8, 5, 8, 14, 12, 12, by="requests") == "requests", "one that others share may do that"
    assert found(0, 0, 0, 8, 14, 12, 12) == "unknown", "what a limit does"
    assert found(2, 2, 0, 2, 4, 6, 9) == "unknown", "too few to say"
    assert found(6, 6, 6, 8, 30, 50, 60) == "unknown", "far more above"


def test_refusals_at_one_level_of_two_are_not_random_yet():
    """Of 20 attempts at the other level none would be refused, either way."""
    few = [point(16, 70.0, attempts=76, refused=5), point(4, 20.0, attempts=20)]
    assert limit_found(few).kind == "requests"


def test_a_limit_that_every_level_is_above_is_not_random():
    """The same share at each, but more calls at once bring no more."""
    points = [point(n, 2.0, refused=200) for n in (4, 8, 16)]
    assert limit_found(points).kind == "requests"
    mostly = [point(n, float(n), refused=600) for n in (2, 4, 8, 16)]
    assert limit_found(mostly).kind == "requests", "where most is refused, neither"


def test_client_limited_levels_say_nothing_of_limits_unless_only_they_were_refused():
    busy = point(64, 9.0, refused=300, limited_by="client")
    assert limit_found([busy]).kind == "requests"
    assert limit_found([point(4, 4.0), busy]).kind == "requests"
    assert limit_found([point(4, 4.0, refused=300, refused_by="concurrency"), busy]).kind == "concurrency"


def test_drift_is_the_first_level_against_itself():
    points = [point(4, 4.0), point(8, 8.0), point(4, 3.0, purpose="more"), point(4, 3.0, purpose="drift")]
    assert drift(points) == -0.25
    assert drift(points[:3]) is None
    assert drift(points[1:]) is None, "its first measurement was a burst, or is not there"
    assert drift([point(4, 0.0), point(4, 3.0, purpose="drift")]) is None


def test_drift_compares_the_same_pace():
    paced = point(4, 2.0, purpose="level", requests_per_minute=120.0)
    assert drift([paced, point(4, 4.0), point(4, 5.0, purpose="drift")]) == 0.25


def test_at_one_pace_a_lower_level_is_proven_by_a_higher_one():
    low = point(6, 4.9, attempts=400, refused=1, requests_per_minute=297.0)
    high = point(12, 4.95, attempts=6000, refused=20, requests_per_minute=297.0)
    other = point(12, 4.5, attempts=6000, refused=0, requests_per_minute=270.0)
    found = {p.setting: p for p in judged([low, high, other])}
    assert found[low.setting].share_429_high == high.share_429_high < low.share_429_high
    assert found[high.setting].share_429_high == high.share_429_high
    assert found[other.setting].share_429_high == other.share_429_high


def test_at_one_pace_fewer_calls_at_once_are_not_refused_more():
    """What a lower level was refused more was the limit's own change while it was measured."""
    lower = point(8, 5.0, requests_per_minute=300.0, refused=25)
    higher = point(16, 5.0, requests_per_minute=300.0, refused=2)
    slower = point(4, 4.0, requests_per_minute=240.0, refused=25)
    shares = {p.level: p.share_429 for p in judged([point(2, 2.0), lower, higher, slower])}
    assert shares == {2: 0.0, 4: 0.025, 8: 0.002, 16: 0.002}


def test_the_window_for_drift_changes_no_limit():
    known = [point(4, 4.0), point(8, 5.0, refused=300, rate=rate(500, 100.0))]
    drifting = point(4, 2.0, refused=500, rate=rate(200, 100.0, slowest=1.0, fastest=8.0), purpose="drift")
    assert limit_found([*known, drifting]) == limit_found(known)


def test_a_rate_changes_where_a_window_that_was_kept_full_is_unsteady():
    """A steady limit lets in what it lets in, to a few per cent."""
    steady = point(16, 5.0, refused=300, rate=rate(500, 100.0), error=0.02, seconds=60.0)
    unsteady = point(32, 5.0, refused=300, rate=rate(500, 100.0), error=0.08, seconds=60.0)
    assert not limit_found([point(4, 4.0), steady]).changes
    assert limit_found([point(4, 4.0), steady, unsteady]).changes
    assert not limit_found([point(4, 4.0), steady, dataclasses.replace(unsteady, window_seconds=5.0)]).changes
    few = dataclasses.replace(unsteady, attempts=400, refused=120)
    hardly = point(8, 5.0, refused=50, error=0.08)
    assert not limit_found([point(4, 4.0), steady, few, hardly]).changes
    apart = point(32, 5.0, refused=300, rate=rate(500, 100.0, slowest=3.0, fastest=7.0))
    assert limit_found([point(4, 4.0), apart]).changes


@pytest.mark.parametrize(("other", "changes"), [(10.0, False), (5.0, True)])
def test_a_rate_changes_where_windows_tell_rates_apart(other, changes):
    """Each was measured within one phase of a slow change."""
    one = point(32, 8.0, refused=500, rate=RateSeen(500, 0, 50.0, 20, None, None))
    two = point(64, 8.0, refused=500, rate=RateSeen(int(50 * other), 0, 50.0, 20, None, None))
    assert limit_found([point(4, 4.0), one, two]).changes is changes


@pytest.mark.parametrize(("refused", "changes"), [(300, True), (50, False)])
def test_a_rate_changes_where_a_window_at_a_pace_far_above_it_tells_rates_apart(refused, changes):
    """A pace that is refused now and then is not limited in between, and tells nothing."""
    known = [point(4, 4.0), point(32, 8.0, refused=500, rate=rate(500, 60.0))]
    paced = point(40, 6.0, refused=refused, requests_per_minute=500.0, rate=rate(500, 80.0, slowest=4.0, fastest=8.0))
    assert limit_found([*known, paced]).changes is changes
