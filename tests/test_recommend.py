"""From windows to one operating point, or a refusal with what to do next: on points written by hand."""

from dataclasses import replace
from pathlib import Path

import pytest

from llmq import Settings
from llmq.errors import ConfigError
from llmq.tune.limits import Separation
from llmq.tune.point import Setting
from llmq.tune.recommend import OperatingPoint, recommend, two_segment_knee
from llmq.tune.standing import PACE_SHARE, Bounds, bounded_p95, calls_to_decide, in_force, rounded_down, standing
from llmq.tune.statistics import wilson
from tests.windows import point, rate

BOUNDS = Bounds()


LINEAR = [point(n, float(n)) for n in (1, 2, 4, 8)]
REFUSED = [point(8, 5.0, refused=300, rate=rate(500, 100.0)), point(16, 5.0, refused=500, rate=rate(500, 100.0))]
"""Above a limit of 5 a second."""


# --- which is recommended


def test_goodput_is_judged_never_the_total():
    answer = recommend([*LINEAR, point(16, 8.0, refused=400, attempt_rate=71.0)], BOUNDS)
    assert (answer.level, answer.binds) == (8, "requests")
    assert "at 16 it turns 40% of the attempts away" in answer.reason


def test_more_goodput_with_too_many_refusals_is_no_better():
    assert recommend([point(4, 4.0), point(5, 5.0, refused=50)], BOUNDS).level == 4


def test_the_smallest_that_is_shown_to_be_good_enough_is_taken():
    points = [point(n, g, error=0.005) for n, g in ((1, 5.0), (2, 9.95), (4, 10.0), (8, 10.05))]
    assert recommend(points, BOUNDS).level == 2
    assert standing(points, BOUNDS).best.level == 8


def test_good_enough_by_chance_is_not_shown():
    """2 has 98 % of 4, within errors of 1 %: that may be chance; within 0.1 % it is not."""
    assert recommend([point(2, 9.8), point(4, 10.0)], BOUNDS).level == 4
    assert recommend([point(2, 9.8, error=0.001), point(4, 10.0, error=0.001)], BOUNDS).level == 2


def test_the_best_of_several_noisy_figures_does_not_push_out_the_others():
    noisy = [point(n, g, error=0.05) for n, g in ((8, 9.9), (16, 10.3), (32, 9.8))]
    found = standing(noisy, BOUNDS)
    assert not [p.level for p in noisy if found.out(p)]
    assert found.chosen is None
    sure = [point(n, g, error=0.001) for n, g in ((8, 9.9), (16, 10.3), (32, 9.8))]
    assert [p.level for p in sure if standing(sure, BOUNDS).out(p)] == [8, 32]
    assert recommend(sure, BOUNDS).level == 16


def test_undecided_is_refused_with_how_much_more_would_decide_it():
    points = [point(4, 10.0, error=0.05, attempts=100), point(8, 10.1, error=0.05, attempts=100)]
    answer = recommend(points, BOUNDS)
    assert (answer.level, answer.yaml, answer.settings, answer.setting) == (None, "", {}, None)
    assert "Undecided: 4 calls at once bring 10" in answer.reason
    # each with errors of 0.05: sqrt(2) * 0.05 * sqrt(100 / n) = 0.03 / 1.645
    assert calls_to_decide(standing(points, BOUNDS), points[0]) == 1504
    assert "about 1504 calls at each of the two" in answer.next_steps[0]


def test_more_windows_decide_what_was_undecided():
    points = [point(n, 10.0, error=0.02) for n in (4, 8)]
    assert recommend(points, BOUNDS).level is None
    assert recommend(points * 4, BOUNDS).level == 4


# --- bounds


def test_a_429_share_that_is_not_proven_is_refused():
    answer = recommend([point(4, 4.0, attempts=50)], BOUNDS)
    assert answer.level is None
    assert "4 calls at once look right" in answer.reason
    assert "50 attempts cannot prove a 429 share under 0.01" in answer.reason
    assert "400 attempts" in answer.next_steps[0]
    assert recommend([point(4, 4.0, attempts=400)], BOUNDS).level == 4


def test_an_error_share_that_is_not_proven_is_refused():
    answer = recommend([point(4, 4.0, failed=5, error_share=0.005, error_share_high=0.02)], BOUNDS)
    assert answer.level is None
    assert "1005 calls cannot prove an error share under 0.01" in answer.reason


def test_a_p95_that_is_not_proven_is_refused():
    bounds = Bounds(slo_p95=2.0)
    assert recommend([point(4, 4.0, service_p95=1.9, service_p95_high=1.95)], bounds).level == 4
    for high in (2.1, None):
        answer = recommend([point(4, 4.0, service_p95=1.9, service_p95_high=high)], bounds)
        assert answer.level is None
        assert "cannot prove a p95 under 2 s" in answer.reason


@pytest.mark.parametrize(
    ("more", "broken"),
    [
        ({}, None),
        ({"refused": 11}, "429 share over 1%"),
        ({"over_rate": 0.2}, "20% over the rate found"),
        ({"limited_by": "client"}, "client-limited"),
        ({"limited_by": "pipeline"}, "pipeline-limited"),
        ({"succeeded": 0}, "nothing succeeded"),
        ({"error_share": 0.02}, "error share over 1%"),
        ({"service_p95": 2.1}, "p95 over 2 s"),
        ({"service_p95": 2.1, "response_p95": 1.9, "offered_rate": 5.0}, None),
        ({"service_p95": 1.9, "response_p95": 2.1, "offered_rate": 5.0}, "p95 over 2 s"),
    ],
)
def test_what_breaks_a_bound(more, broken):
    assert Bounds(slo_p95=2.0).broken_by(point(4, 4.0, **more)) == broken


def test_an_open_loop_is_bound_by_response_times():
    times = {"service_p95": 1.0, "service_p95_high": 1.1, "response_p95": 5.0, "response_p95_high": 6.0}
    assert bounded_p95(point(4, 4.0, **times)) == (1.0, 1.1)
    assert bounded_p95(point(4, 4.0, offered_rate=3.0, **times)) == (5.0, 6.0)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"max_429_ratio": 5}, "max_429_ratio is a share between 0 and 1, got 5"),
        ({"max_error_ratio": -0.1}, "max_error_ratio is a share between 0 and 1, got -0.1"),
        ({"slo_p95": 0}, "slo_p95 must be more than 0 seconds, got 0"),
        ({"slo_p95": float("nan")}, "slo_p95 must be more than 0 seconds"),
    ],
)
def test_bounds_that_mean_nothing_are_refused(bounds, message):
    with pytest.raises(ConfigError, match=message):
        Bounds(**bounds)


@pytest.mark.parametrize("cause", ["client", "pipeline"])
def test_a_level_that_client_or_pipeline_limited_says_nothing(cause):
    answer = recommend([point(1, 1.0), point(2, 2.0, limited_by=cause)], BOUNDS)
    assert (answer.level, answer.binds) == (1, cause)
    alone = recommend([point(1, 1.0, limited_by=cause)], BOUNDS)
    assert (alone.level, alone.binds) == (None, cause)


def test_what_is_over_the_rate_found_is_not_sustained():
    """9 was clean at 8.4 a second, on what a rested bucket held; refused levels show 5."""
    answer = recommend([point(4, 4.0), point(9, 8.4), *REFUSED[1:]], BOUNDS)
    assert (answer.level, answer.binds) == (4, "requests")


# --- what binds


def test_a_rate_that_binds_is_answered_with_a_pace():
    paced = point(10, 4.94, requests_per_minute=297.0, error=0.002)
    answer = recommend([point(4, 4.0), *REFUSED, paced], BOUNDS)
    assert answer.setting == Setting(10, requests_per_minute=297.0)
    assert (answer.binds, answer.goodput) == ("requests", 4.94)
    assert "at 5 calls/s (by 1000 calls let in between refusals)" in answer.reason
    assert answer.yaml == ("llm_queue_enabled: true\nllm_queue_concurrency: 10\nllm_queue_requests_per_minute: 297\n")
    assert "10 calls at once, starts paced at 297 requests/min" in str(answer)


def test_the_smallest_level_that_holds_the_pace_is_taken():
    paced = [point(n, g, requests_per_minute=297.0, error=0.002) for n, g in ((5, 4.6), (7, 4.93), (10, 4.94))]
    assert recommend([point(4, 4.0), *REFUSED, *paced], BOUNDS).level == 7


@pytest.mark.parametrize(("share", "level"), [(0.987, 7), (0.983, 10)])
def test_a_paced_level_is_held_against_its_pace_and_not_against_what_a_higher_one_happened_to_bring(share, level):
    lucky = point(10, 5.2, requests_per_minute=300.0, error=0.02)
    smaller = point(7, 5.0 * share, requests_per_minute=300.0, error=0.001)
    assert recommend([point(4, 4.0), *REFUSED, lucky, smaller], BOUNDS).level == level


@pytest.mark.parametrize(("tokens", "level"), [(98.7, 7), (98.3, 10)])
def test_a_pace_in_tokens_is_held_in_tokens(tokens, level):
    """Calls that happened to be small are more a second."""
    limited = [replace(p, refused_by="tokens", rate=rate(500, 100.0, tokens=10_000)) for p in REFUSED]
    more = {"tokens_per_minute": 6000.0, "error": 0.001}
    told = [
        {"tokens_per_second": n, "tokens_per_second_low": n - 0.1, "tokens_per_second_high": n + 0.1}
        for n in (tokens, 100.0)
    ]
    paced = [point(7, 6.0, **told[0], **more), point(10, 5.0, **told[1], **more)]
    assert recommend([point(4, 4.0), *limited, *paced], BOUNDS).level == level


def test_where_calls_fail_a_pace_is_reached_less():
    """The highest level surely brings 97 % of it, so 98.5 % of that is enough."""
    paced = [point(n, g, requests_per_minute=300.0, error=0.001) for n, g in ((7, 4.81), (10, 4.85))]
    assert recommend([point(4, 4.0), *REFUSED, *paced], BOUNDS).level == 7


def test_of_two_levels_at_one_pace_the_higher_is_good_enough_however_noisy_they_are():
    noisy = [point(n, g, requests_per_minute=297.0, error=0.03) for n, g in ((7, 4.93), (10, 4.9))]
    assert recommend([point(4, 4.0), *REFUSED, *noisy], BOUNDS).level == 10


def test_the_fastest_clean_pace_is_taken():
    slower = point(10, 4.45, requests_per_minute=267.0, error=0.002)
    too_fast = point(10, 4.94, requests_per_minute=297.0, refused=50, rate=rate(300, 66.0), error=0.002)
    answer = recommend([point(4, 4.0), *REFUSED, slower, too_fast], BOUNDS)
    assert answer.requests_per_minute == 267.0


def test_a_pace_in_tokens_is_set_in_tokens():
    seen = rate(500, 100.0, tokens=50_000)
    tokens = point(10, 4.94, tokens_per_minute=29_700.4, error=0.002)
    points = [point(4, 4.0), point(8, 5.0, refused=300, refused_by="tokens", rate=seen), tokens]
    answer = recommend(points, BOUNDS)
    assert answer.binds == "tokens"
    assert answer.settings["llm_queue_tokens_per_minute"] == 29_700
    assert "or 30000 tokens/min" in answer.reason


def test_without_a_pace_that_was_measured_the_clean_level_is_the_answer():
    answer = recommend([point(4, 4.0), *REFUSED], BOUNDS)
    assert answer.setting == Setting(4)
    assert "llm_queue_requests_per_minute" not in answer.settings


def test_a_rate_that_changes_is_told():
    changing = [point(8, 5.0, refused=300, rate=rate(500, 100.0, slowest=2.0, fastest=8.0))]
    assert "It changes: 2 to 8 calls/s" in recommend([point(4, 4.0), *changing], BOUNDS).reason
    assert "changes" not in recommend([point(4, 4.0), *REFUSED], BOUNDS).reason


def test_a_limit_on_calls_at_once():
    above = point(16, 12.0, refused=500, refused_by="concurrency", separation=Separation(1.0, 12, 12))
    answer = recommend([point(8, 8.0), point(12, 12.0), above], BOUNDS)
    assert (answer.level, answer.binds, answer.requests_per_minute) == (12, "concurrency", None)
    assert "it never lets more than 12 in; at 16 it turns 50%" in answer.reason


def test_a_server_that_saturates():
    answer = recommend([point(4, 4.0), point(8, 8.0), point(16, 8.0, service_mean=2.0)], BOUNDS)
    assert (answer.level, answer.binds) == (8, "server")
    assert "at 16 the mean service time is 2.00 times as long, for +0% calls" in answer.reason


def test_without_a_limit_more_would_bring_more():
    answer = recommend(LINEAR, BOUNDS)
    assert (answer.level, answer.binds) == (8, "latency")
    assert "Raise the levels beyond 8" in answer.reason
    assert "No limit was met, in 1000 calls" in str(answer)


def test_the_pipeline_binds_where_the_next_level_stays_unfilled():
    answer = recommend([point(4, 4.0), point(8, 5.0, limited_by="pipeline", in_flight=5.2)], BOUNDS)
    assert (answer.level, answer.binds) == (4, "pipeline")
    assert "kept only 5.2 calls in flight" in answer.reason


def test_this_client_binds_with_its_evidence():
    busy = point(8, 5.0, limited_by="client", cpu_share=0.97, loop_lag_p99=0.25)
    answer = recommend([point(4, 4.0), busy], BOUNDS)
    assert (answer.level, answer.binds) == (4, "client")
    assert "97% of a core, event-loop lag p99 250 ms" in answer.reason


def test_a_bound_on_p95_binds():
    times = [{"service_p95": n / 4, "service_p95_high": n / 4 + 0.1} for n in (4, 8)]
    answer = recommend([point(4, 4.0, **times[0]), point(8, 8.0, **times[1])], Bounds(slo_p95=1.5))
    assert (answer.level, answer.binds) == (4, "slo")
    assert "At 8 the p95 of 2 s breaks the bound" in answer.reason


def test_errors_bind():
    answer = recommend([point(4, 4.0), point(8, 7.0, error_share=0.1)], BOUNDS)
    assert (answer.level, answer.binds) == (4, "errors")
    assert "At 8 10.0% of the calls fail" in answer.reason


def test_nothing_is_lowered_for_refusals_that_concurrency_does_not_cause():
    points = [point(n, float(n), refused=30) for n in (2, 4, 8, 16)]
    answer = recommend(points, BOUNDS)
    assert answer.level == 16
    assert "3.0% of all attempts are refused, at every level alike" in str(answer)
    assert in_force(points, BOUNDS) == Bounds(max_429_ratio=1.0)
    rare = [point(n, float(n), refused=3) for n in (2, 4, 8, 16)]
    assert in_force(rare, BOUNDS) == BOUNDS, "the bound holds them"


# --- refusals to answer


def test_nothing_measured_is_said():
    answer = recommend([], BOUNDS)
    assert answer.level is None
    assert "Nothing has been measured yet" in answer.reason
    assert recommend([point(8, 8.0, purpose="burst")], BOUNDS).level is None


@pytest.mark.parametrize(
    ("only", "binds", "advice"),
    [
        (point(1, 1.0, refused=500), "requests", "measure lower levels or longer"),
        (point(1, 1.0, error_share=0.3, failed=300), "errors", "Look at the errors first"),
        (point(1, 1.0, service_p95=9.0), "slo", "slower than the bound"),
        (point(1, 1.0, limited_by="client"), "client", "quieter machine"),
        (point(1, 1.0, limited_by="pipeline"), "pipeline", "more items"),
        (point(1, 0.0, succeeded=0), "unknown", "measure longer"),
    ],
)
def test_nothing_feasible_is_refused_with_the_cause_and_what_to_do(only, binds, advice):
    answer = recommend([only], Bounds(slo_p95=5.0))
    assert (answer.level, answer.binds, answer.yaml) == (None, binds, "")
    assert str(answer).startswith("No level can be recommended.")
    assert advice in " ".join(answer.next_steps)
    assert "at 1: " in answer.reason


# --- how sure, and what else is told


def test_the_answer_says_how_sure_it_is():
    answer = recommend(LINEAR, BOUNDS)
    assert (answer.level_low, answer.level_high, answer.confidence) == (8, 8, 1.0)
    assert (answer.goodput, answer.share_429) == (8.0, 0.0)
    assert (answer.goodput_low, answer.goodput_high) == pytest.approx((8 * 0.9804, 8 * 1.0196))
    assert answer.share_429_high == wilson(0, 1000).high
    near = recommend([point(2, 9.8), point(4, 10.0)], BOUNDS)
    assert (near.level, near.level_low, near.level_high) == (4, 2, 4), "2 may be enough"
    assert near.confidence > 0.95
    assert recommend([point(2, 9.8), point(4, 10.0)], BOUNDS) == near, "the draws are the same each time"


def test_where_a_two_segment_fit_disagrees_confidence_is_lower():
    slow = {1: 1.18, 2: 2.21, 4: 3.93, 8: 6.32, 16: 8.65, 32: 9.82, 64: 9.997}
    answer = recommend([point(n, g, error=0.001) for n, g in slow.items()], BOUNDS)
    assert answer.level == 32
    assert answer.confidence == 0.8
    assert "A two-segment fit puts the knee at" in str(answer)
    knee = recommend([point(n, float(min(n, 8)), error=0.001) for n in (1, 2, 4, 8, 16, 32)], BOUNDS)
    assert (knee.level, knee.confidence) == (8, 1.0)


def test_a_two_segment_knee_by_hand():
    assert two_segment_knee([1, 2, 4, 8, 16], [1.0, 2.0, 4.0, 4.0, 4.0]) == pytest.approx(4.0)
    assert two_segment_knee([1, 2, 4, 8], [2.0, 4.0, 6.0, 6.0]) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("present", "words"),
    [
        (16, "You run 16: about 46% of its attempts are refused."),
        (2, "You run 2: about 50% of what 4 brings."),
        (1, "You run 1: about 25% of what 4 brings."),
        (4, None),
        (None, None),
    ],
)
def test_what_the_present_setting_wastes(present, words):
    points = [point(1, 1.0), point(4, 4.0), point(16, 4.3, refused=460)]
    assert recommend(points, BOUNDS, present=present).waste == words


def test_slots_that_are_not_needed_are_a_waste_too():
    points = [point(8, 8.0), point(32, 8.0, service_mean=4.0)]
    assert recommend(points, BOUNDS, present=20).waste == "You run 20: 12 calls at once more than are needed."
    assert recommend(points, BOUNDS, present=9).waste is None


def test_hung_calls_are_told():
    assert "Of 10.0 calls in flight 4.0 did not end" in str(recommend([point(10, 6.0)], BOUNDS))
    assert "did not end" not in str(recommend(LINEAR, BOUNDS))


def test_drift_is_told_where_it_is_more_than_chance():
    drifted = [*LINEAR, point(1, 0.7, purpose="drift")]
    assert "brought -30% calls" in str(recommend(drifted, BOUNDS))
    by_chance = [point(1, 1.0, error=0.3), *LINEAR[1:], point(1, 0.7, error=0.3, purpose="drift")]
    assert "drifted" not in str(recommend(by_chance, BOUNDS))
    little = [*LINEAR, point(1, 0.95, purpose="drift")]
    assert "drifted" not in str(recommend(little, BOUNDS))


def test_an_unsteady_window_and_few_samples_are_told():
    assert "was not like the first" in str(recommend([point(4, 4.0, steady=False)], BOUNDS))
    few = recommend([point(4, 4.0, attempts=71)], Bounds(max_429_ratio=0.1, max_error_ratio=0.1))
    assert "Only 71 calls: p95 is a rough figure" in str(few)


# --- the settings


@pytest.mark.parametrize(
    ("answer", "pairs"),
    [
        (OperatingPoint(8, "server", ""), {"llm_queue_concurrency": 8}),
        (OperatingPoint(8, "requests", "", requests_per_minute=297.9), {"llm_queue_requests_per_minute": 297}),
        (OperatingPoint(8, "tokens", "", tokens_per_minute=29_700.7), {"llm_queue_tokens_per_minute": 29_700}),
        (OperatingPoint(8, "pipeline", "", services_open=12), {"concurrency": 12}),
    ],
)
def test_the_yaml_is_what_the_settings_read(answer, pairs):
    Path("app.yaml").write_text(answer.yaml)
    found = Settings("app.yaml")
    assert found.llm_queue_enabled
    assert {name: getattr(found, name) for name in pairs} == pairs
    assert {name: getattr(found, name) for name in answer.settings} == answer.settings
    assert Settings(**answer.settings).queue_policy == found.queue_policy


def test_a_pace_under_one_a_minute_is_still_a_pace():
    """Rounded down it would be 0, which the settings refuse."""
    answer = OperatingPoint(1, "requests", "", requests_per_minute=0.6)
    assert Settings(**answer.settings).llm_queue_requests_per_minute is not None


def test_the_pace_that_is_asked_for_is_a_little_less_than_the_rate():
    assert 0.9 < PACE_SHARE < 1


def test_the_best_of_several_alike_is_a_lucky_one():
    """Of 8.0, 8.05 and 8.2, each give or take 1.2 %, none is shown to be less; 7.97 has 97 % of their mean for sure."""
    points = [point(n, g, error=0.012, seconds=100.0) for n, g in ((8, 4.0), (21, 8.0), (32, 8.2), (64, 8.05))]
    candidate = point(16, 7.97, error=0.006, seconds=100.0)
    assert recommend([*points, candidate], BOUNDS).level == 16
    assert recommend([*points, replace(candidate, goodput=7.8)], BOUNDS).level != 16


def test_where_the_limit_changes_the_pace_at_the_edge_is_not_taken():
    """297 was just not refused, which is luck; 294 a little slower."""
    changing = [replace(p, rate=rate(500, 100.0, slowest=3.0, fastest=7.0)) for p in REFUSED]
    paced = [point(10, pace / 60, requests_per_minute=pace, error=0.002) for pace in (270.0, 294.0, 297.0)]
    assert recommend([point(4, 4.0), *changing, *paced], BOUNDS).requests_per_minute == 294
    assert recommend([point(4, 4.0), *changing, paced[-1]], BOUNDS).requests_per_minute == 297, "there is no other"
    assert recommend([point(4, 4.0), *REFUSED, *paced], BOUNDS).requests_per_minute == 297, "it does not change"


def test_a_pace_is_rounded_down_but_not_below_what_it_is_but_for_the_last_bit():
    assert [rounded_down(pace) for pace in (0.99 * 60 * 60.0, 3563.9, 12.34, 0.567)] == [3564, 3563, 12.3, 0.567]
