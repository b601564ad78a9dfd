"""The rules from points to a number, on points written by hand."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmq.records import AttemptRecord, OperationRecord, RecordList, Records
from llmq.tune.point import Point, Window, measure
from llmq.tune.recommend import Bounds, drift, judged, next_level, recommend, to_confirm
from llmq.tune.statistics import overlap_seconds, percentile, wilson


def point(level, goodput, **more):
    attempts = more.pop("attempts", 1000)
    refused = more.pop("refused", 0)
    low, high = wilson(refused, attempts)
    found = Point(
        level=level,
        order=0,
        purpose="level",
        window_seconds=10.0,
        warm_up_seconds=1.0,
        succeeded=attempts - refused,
        attempts=attempts,
        refused=refused,
        failed=0,
        goodput=goodput,
        goodput_error=0.01 * goodput,
        attempt_rate=goodput,
        share_429=refused / attempts,
        share_429_low=low,
        share_429_high=high,
        error_share=0.0,
        refused_by="requests" if refused else None,
        in_flight=float(level),
        service_mean=1.0,
        service_p50=1.0,
        service_p95=1.5,
        wait_p50=0.0,
        wait_p95=0.0,
        cpu_share=0.1,
        loop_lag_p99=0.001,
        limited_by=None,
    )
    return dataclasses.replace(found, **more)


LINEAR = [point(n, float(n)) for n in (1, 2, 4, 8)]
BOUNDS = Bounds()


def test_goodput_is_judged_never_the_total():
    points = [*LINEAR, point(16, 8.0, refused=400, attempt_rate=71.0)]
    answer = recommend(points, BOUNDS)
    assert (answer.level, answer.binds) == (8, "requests")
    assert "at 16 it turns 40% of the attempts away" in answer.reason


def test_the_smallest_of_the_good_enough_is_taken():
    points = [point(1, 5.0), point(2, 9.8), point(4, 10.0), point(8, 10.1)]
    assert recommend(points, BOUNDS).level == 2


def test_the_best_of_several_noisy_figures_is_taken_for_a_lucky_one():
    noisy = [point(8, 9.5, goodput_error=0.4), point(16, 10.3, goodput_error=0.4), point(32, 9.9, goodput_error=0.4)]
    assert recommend(noisy, BOUNDS).level == 8
    sure = [dataclasses.replace(p, goodput_error=0.01) for p in noisy]
    assert recommend(sure, BOUNDS).level == 16


def test_hung_calls_are_told():
    answer = recommend([point(10, 6.0, in_flight=10.0)], BOUNDS)
    assert "Of 10.0 calls in flight 4.0 did not end" in str(answer)


def test_more_goodput_with_too_many_refusals_is_no_better():
    assert recommend([point(4, 4.0), point(5, 5.0, refused=50)], BOUNDS).level == 4


@pytest.mark.parametrize("cause", ["client", "pipeline"])
def test_a_level_that_client_or_pipeline_limited_says_nothing(cause):
    answer = recommend([point(1, 1.0), point(2, 2.0, limited_by=cause)], BOUNDS)
    assert (answer.level, answer.binds) == (1, cause)
    assert recommend([point(1, 1.0, limited_by=cause)], BOUNDS).level is None


def test_nothing_measured_and_nothing_feasible_are_refusals_that_say_what_to_do():
    assert recommend([], BOUNDS).level is None
    answer = recommend([point(1, 1.0, refused=500)], BOUNDS)
    assert (answer.level, answer.yaml) == (None, "")
    assert "spaced out in time, or the limit raised" in str(answer)


def test_the_yaml_is_what_the_settings_read(tmp_path):
    from llmq import Settings

    file = tmp_path / "app.yaml"
    file.write_text(recommend(LINEAR, BOUNDS).yaml)
    assert Settings(file).llm_queue_concurrency == 8
    assert Settings(file).llm_queue_enabled


def test_doubt_is_told():
    answer = recommend([point(1, 1.0, attempts=50)], BOUNDS)
    assert "Only 50 calls" in str(answer)
    assert "cannot prove a 429 share under 1%" in str(answer)
    drifted = [*LINEAR, point(1, 0.7, purpose="drift")]
    assert drift(drifted) == pytest.approx(-0.3)
    assert "brought -30% calls" in str(recommend(drifted, BOUNDS))
    assert drift(LINEAR) is None


def test_bisection_closes_in_on_the_edge():
    """Truth: clean up to 21, refused above."""
    points = [point(n, float(min(n, 21)), refused=0 if n <= 21 else 300) for n in (1, 2, 4, 8, 16, 32, 64)]
    asked = []
    while (level := next_level(points, BOUNDS)) is not None:
        asked.append(level)
        points.append(point(level, float(min(level, 21)), refused=0 if level <= 21 else 300))
        assert len(asked) < 10
    assert asked == [24, 20, 22]
    assert recommend(points, BOUNDS).level == 20


def test_bisection_finds_the_lower_end_of_a_plateau():
    def truth(level):
        return float(min(level, 10))

    points = [point(n, truth(n)) for n in (1, 2, 4, 8, 16, 32)]
    while (level := next_level(points, BOUNDS)) is not None:
        points.append(point(level, truth(level)))
    assert recommend(points, BOUNDS).level == 10


def test_a_short_clean_window_next_to_a_refused_one_is_confirmed_once():
    points = [point(8, 8.0, attempts=80), point(16, 8.0, refused=500)]
    level, seconds = to_confirm(points, BOUNDS)
    assert (level, seconds) == (8, 50.0), "400 attempts at 8 a second"
    points.append(point(8, 8.0, attempts=400, window_seconds=50.0, purpose="confirm"))
    assert to_confirm(points, BOUNDS) is None
    assert to_confirm([point(8, 80.0)], BOUNDS) == (8, 50.0), "nothing refused: as long as a bucket of a minute needs"
    busy = [point(8, 800.0), point(16, 800.0, refused=500)]
    assert to_confirm(busy, BOUNDS) is None, "1,000 clean attempts are enough next to a refused level"
    assert [p.purpose for p in judged(points)] == ["confirm", "level"]


def record(kind, ended_at, *, started_at=None, outcome="ok", **more):
    common = {"operation_id": 1, "stage": None, "model_name": None, "service_id": None, "request_id": None}
    if kind is AttemptRecord:
        return AttemptRecord(
            **common,
            attempt=1,
            submitted_at=started_at,
            started_at=started_at,
            ended_at=ended_at,
            outcome=outcome,
            **more,
        )
    return OperationRecord(**common, submitted_at=0.0, ended_at=ended_at, attempts=1, wait_seconds=0.5, outcome=outcome)


def test_a_clean_level_above_the_rate_that_refused_levels_show_is_not_sustained():
    refused = point(16, 80.0, refused=400, admitted=800, admitted_seconds=10.0)
    answer = recommend([point(8, 40.0), point(9, 84.0), refused], BOUNDS)
    assert (answer.level, answer.binds) == (8, "requests")
    assert "at 80 calls/s" in answer.reason
    assert recommend([point(8, 40.0), point(9, 80.5), refused], BOUNDS).level == 9, "within its own error of the rate"
    busy = point(64, 80.0, refused=700, admitted=950, admitted_seconds=10.0, limited_by="client")
    assert recommend([point(8, 40.0), point(9, 84.0), refused, busy], BOUNDS).level == 8, "a busy client is not asked"
    assert recommend([point(8, 40.0), point(9, 120.0), busy], BOUNDS).level == 8, "but for want of others"


@pytest.mark.parametrize("cause", ["client", "pipeline"])
def test_a_rate_that_others_found_binds_also_where_the_next_level_says_nothing(cause):
    refused = point(16, 80.0, refused=400, admitted=800, admitted_seconds=10.0)
    beyond = [point(7, 70.0), point(9, 72.0, limited_by=cause), refused]
    assert recommend(beyond, BOUNDS).binds == "requests", "9 would need 90 calls/s"
    below = [point(7, 40.0), point(9, 41.0, limited_by=cause), refused]
    assert recommend(below, BOUNDS).binds == cause, "9 would need 51, and 80 are let in"


def test_what_was_measured_on_a_burst_is_not_judged():
    points = [point(16, 80.0, purpose="burst"), point(4, 4.0), point(8, 4.0, refused=500)]
    assert recommend(points, BOUNDS).level == 4


def test_a_point_counts_what_ended_in_its_window():
    attempts = [
        record(AttemptRecord, 9.0, started_at=8.0),  # before
        record(AttemptRecord, 11.0, started_at=9.0),
        record(AttemptRecord, 12.0, started_at=11.0),
        record(AttemptRecord, 12.5, started_at=12.5, outcome="rejected", limit_type="tokens"),
        record(AttemptRecord, 13.0, started_at=12.0, outcome="error"),
        record(AttemptRecord, 21.0, started_at=18.0, outcome="cancelled"),  # at the end of the window
    ]
    operations = [
        record(OperationRecord, 11.0),
        record(OperationRecord, 13.0, outcome="error"),
        record(OperationRecord, 25.0),
    ]
    found = measure(2, Records(RecordList(operations), RecordList(attempts)), Window(10.0, 20.0, 3.0))
    assert (found.succeeded, found.attempts, found.refused, found.failed) == (2, 4, 1, 1)
    assert (found.goodput, found.attempt_rate) == (0.2, 0.4)
    assert (found.share_429, found.error_share, found.refused_by) == (0.25, 0.5, "tokens")
    assert (found.service_p50, found.service_mean) == (1.5, 1.5)
    assert found.in_flight == pytest.approx((1 + 1 + 0 + 1 + 2) / 10)


@pytest.mark.parametrize(
    ("cpu", "lag", "limited_by"),
    [(0.5, 0.01, None), (0.9, 0.01, "client"), (0.5, 0.2, "client"), (None, None, None)],
)
def test_the_client_as_the_limit_is_told_by_cpu_and_lag(cpu, lag, limited_by):
    attempts = [record(AttemptRecord, float(n + 1), started_at=float(n)) for n in range(10)]
    found = measure(1, Records(RecordList(), RecordList(attempts)), Window(0.0, 10.0, 0.0, cpu, lag))
    assert found.limited_by == limited_by


def test_an_unfilled_level_is_the_pipelines_unless_it_is_refused():
    attempts = [record(AttemptRecord, float(n + 1), started_at=float(n)) for n in range(10)]
    found = measure(4, Records(RecordList(), RecordList(attempts)), Window(0.0, 10.0, 0.0))
    assert found.limited_by == "pipeline"
    refused = [*attempts, record(AttemptRecord, 5.0, started_at=5.0, outcome="rejected", limit_type="requests")]
    assert measure(4, Records(RecordList(), RecordList(refused)), Window(0.0, 10.0, 0.0)).limited_by is None


def test_percentiles_by_hand():
    assert percentile([], 0.5) is None
    assert percentile([3.0], 0.95) == 3.0
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
    assert percentile([0.0, 10.0], 0.95) == 9.5


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 1))
def test_percentiles_stay_within_the_sample_and_agree_with_numpy(values, share):
    import numpy as np

    assert percentile(values, share) == pytest.approx(float(np.quantile(values, share)), rel=1e-9, abs=1e-6)


def test_wilson_by_the_book():
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(10, 100)
    assert (round(low, 4), round(high, 4)) == (0.0552, 0.1744)
    assert wilson(0, 400)[1] < 0.01


def test_overlap_counts_time_inside_only():
    assert overlap_seconds([(0, 5), (4, 20), (30, 40)], 3, 10) == 2 + 6
