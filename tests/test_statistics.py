"""The figures behind a point, by hand and by simulation."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmq.tune.running import lag_p99
from llmq.tune.statistics import (
    SAMPLES_FOR_P95,
    block_counts,
    count_interval,
    overlap_seconds,
    percentile,
    percentile_interval,
    settled_from,
    spread,
    wilson,
)


def test_percentiles_by_hand():
    assert percentile([], 0.5) is None
    assert percentile([3.0], 0.95) == 3.0
    assert percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert percentile([0.0, 10.0], 0.95) == 9.5


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 1))
def test_percentiles_agree_with_numpy(values, share):
    assert percentile(values, share) == pytest.approx(float(np.quantile(values, share)), rel=1e-9, abs=1e-6)


def test_the_interval_of_a_percentile_is_two_order_statistics():
    ordered = [float(n) for n in range(1, 101)]
    assert percentile_interval(ordered, 0.5) == (40.0, 61.0), "the book's ranks for the median of 100"
    assert percentile_interval(ordered, 0.95) == (90.0, 100.0)
    assert percentile_interval(ordered[::-1], 0.5) == (40.0, 61.0)


@pytest.mark.parametrize(("share", "least"), [(0.5, 6), (0.95, SAMPLES_FOR_P95), (0.99, 368)])
def test_too_few_values_have_no_interval(share, least):
    assert percentile_interval([1.0] * (least - 1), share) is None
    assert percentile_interval([1.0] * least, share) == (1.0, 1.0)
    assert percentile_interval([], share) is None


def test_wilson_by_the_book():
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(10, 100)
    assert (round(low, 4), round(high, 4)) == (0.0552, 0.1744)
    assert wilson(0, 381)[1] < 0.01 < wilson(0, 380)[1]
    assert wilson(7, 7)[1] == 1.0
    assert wilson(50, 100, z=1.0) == pytest.approx((0.4502, 0.5498), abs=1e-4)


def test_overlap_counts_time_inside_only():
    assert overlap_seconds([(0, 5), (4, 20), (30, 40)], 3, 10) == 2 + 6


def test_blocks_are_equal_parts_of_the_window():
    assert block_counts([0.5, 1.5, 1.6, 3.9, 4.0, 7.0], 0.0, 4.0, blocks=4) == (1, 2, 0, 2)
    assert len(block_counts([], 0.0, 4.0)) == 40


def test_the_count_of_too_few_blocks_is_not_known():
    assert count_interval([3, 4, 3, 4]) == (0.0, math.inf)
    assert count_interval([]) == (0.0, math.inf)


def test_a_constant_count_is_known_to_half_a_call():
    assert count_interval([0] * 40) == (0.0, 0.5)
    assert count_interval([5] * 40) == (199.5, 200.5)


def poisson_ends(rng, rate, seconds):
    """Ends of calls whose gaps are independent and exponential."""
    ends, now = [], rng.expovariate(rate)
    while now < seconds:
        ends.append(now)
        now += rng.expovariate(rate)
    return ends


def slots_ends(rng, level, sigma, seconds):
    """Ends of calls in `level` slots, each busy always: log-normal times of mean 1 s. From 20 s on: settled."""
    ends = []
    for _ in range(level):
        now = 0.0
        while now < seconds + 20:
            now += math.exp(sigma * rng.gauss(0, 1) - sigma**2 / 2)
            ends.append(now - 20)
    return ends


def covered(make, truth, runs=400, seconds=100.0):
    """How often the interval holds the truth, and how wide it is on average by the truth."""
    found = [count_interval(block_counts(make(), 0.0, seconds)) for _ in range(runs)]
    hits = sum(interval.low <= truth <= interval.high for interval in found) / runs
    return hits, sum(interval.high - interval.low for interval in found) / runs / truth


def test_the_interval_of_a_count_holds_the_truth_as_often_as_it_says():
    """95 %, give or take what a few hundred runs and an estimated variance leave open."""
    rng = random.Random(1)
    hits, width = covered(lambda: poisson_ends(rng, 10.0, 100.0), 1000)
    assert 0.91 <= hits <= 0.99
    assert width == pytest.approx(2 * 1.96 * math.sqrt(1000) / 1000, rel=0.3), "of Poisson counts, sqrt(n) each way"
    hits, narrower = covered(lambda: slots_ends(rng, 8, 0.5, 100.0), 800)
    assert 0.91 <= hits <= 0.995
    assert narrower < 0.75 * 2 * 1.96 * math.sqrt(800) / 800, "slots are more regular than chance"


def test_evenly_paced_calls_have_a_narrow_interval():
    """10 a second, each up to 0.3 s late: plain batch means would count the edges of each batch."""
    rng = random.Random(2)
    hits, width = covered(lambda: [n / 10 + 0.3 * rng.random() for n in range(-5, 1005)], 1000, runs=100)
    assert hits >= 0.95
    assert width < 0.012, "an eighth of what independent calls would have"


def test_blocks_that_hang_together_widen_the_interval():
    """The same counts, in runs or in turns: what comes in runs says less."""
    in_turns, in_runs = [8, 12] * 20, ([8] * 5 + [12] * 5) * 4

    def width(interval):
        return interval.high - interval.low

    assert width(count_interval(in_runs)) > 3 * width(count_interval(in_turns))


def test_a_cold_start_is_cut():
    assert settled_from([1, 2, 3, 10, 11, 9, 10, 10, 9, 11, 10, 10, 9, 10, 11, 10]) == 3


@pytest.mark.parametrize("seed", range(20))
def test_plain_noise_is_not_cut(seed):
    rng = random.Random(seed)
    assert settled_from([rng.gauss(10, 1) for _ in range(40)]) == 0


@pytest.mark.parametrize(
    ("series", "why"),
    [
        ([0, 0, 9, 9, 9, 9, 9], "fewer than 8 are too few"),
        ([float(n) for n in range(40)], "it never settles"),
        ([1] * 25 + [9] * 15, "it settles past the middle, or will change again"),
        ([5] * 40, "nothing to cut"),
    ],
)
def test_nothing_is_cut_where_nothing_says_that_it_settles(series, why):
    assert settled_from(series) == 0, why


def test_spread_is_the_coefficient_of_variation():
    assert spread([1.0, 3.0]) == pytest.approx(math.sqrt(2) / 2)
    assert spread([2.0, 2.0, 2.0]) == 0.0
    assert spread([2.0]) == spread([]) == 1.0


def test_two_hiccups_in_a_second_are_no_lag_of_the_client():
    assert lag_p99([0.001] * 98 + [0.05, 0.06]) == 0.001
    assert lag_p99([0.001] * 97 + [0.05] * 3) == pytest.approx(0.05)
    assert lag_p99([0.001] * 900 + [0.05] * 20) == 0.05
    assert (lag_p99([]), lag_p99([0.2]), lag_p99([0.1, 0.2])) == (None, 0.2, 0.1)
