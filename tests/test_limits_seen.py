"""What refusals tell of the limit behind them, on attempts written by hand."""

import random

import pytest

from llmq.records import AttemptRecord, Records
from llmq.tune.limits import RateSeen, Separation, closed_seconds, rate_seen, separation
from llmq.tune.point import Window, settled_part


def attempt(started_at, outcome="ok", *, seconds=1.0, tokens=None):
    ended_at = started_at + (seconds if outcome == "ok" else 0.005)
    return AttemptRecord(
        1, 1, None, None, None, None, started_at, started_at, ended_at, outcome,
        input_tokens=tokens, output_tokens=tokens,
    )  # fmt: skip


def let_in(*times, **more):
    return [attempt(at, **more) for at in times]


def refused(*times):
    return [attempt(at, "rejected") for at in times]


def test_a_token_bucket_lets_in_its_rate_between_onsets():
    """2 a second: the burst before the first refusal is not counted, nor what comes after the last."""
    burst = let_in(0.0, 0.1, 0.2, 0.3)
    steady = [*refused(1.0), *let_in(1.25, 1.75), *refused(2.0), *let_in(2.25, 2.75), *refused(3.0)]
    found = rate_seen([*burst, *steady, *let_in(3.25)])
    assert found == RateSeen(admitted=4, tokens=0, seconds=2.0, onsets=3, slowest=None, fastest=None)
    assert found.per_second == 2.0


def test_a_fixed_window_goes_on_refusing_and_that_is_one_onset():
    """3 in each window of 10 s, all at its beginning; refused until its end."""
    calls = []
    for begin in (0.0, 10.0, 20.0):
        calls += [*let_in(begin, begin + 0.5, begin + 1.0), *refused(begin + 1.5, begin + 4.0, begin + 9.0)]
    found = rate_seen(calls)
    assert (found.admitted, found.seconds, found.onsets) == (6, 20.0, 3)
    assert found.per_second == 0.3


def test_of_those_that_start_at_one_moment_the_admitted_come_first():
    """Records come in order of their end, and refusals end first: the order of the list says nothing."""
    together = [*refused(1.0, 1.0), *let_in(1.0, 1.0, 1.0), *refused(2.0, 2.0), *let_in(2.0, 2.0)]
    found = rate_seen(together)
    assert (found.onsets, found.admitted, found.per_second) == (2, 2, 2.0)


def test_tokens_are_counted_along():
    calls = [*refused(1.0), *let_in(1.5, 1.6, tokens=50), *refused(2.0)]
    assert rate_seen(calls).tokens == 200


@pytest.mark.parametrize(
    "calls",
    [
        [],
        let_in(1.0, 2.0),
        refused(1.0, 2.0, 3.0),
        [*let_in(1.0), *refused(2.0)],
        [*refused(1.0, 1.0), *let_in(1.0)],
    ],
)
def test_fewer_than_two_onsets_tell_nothing(calls):
    assert rate_seen(calls) is None


def test_what_never_got_a_slot_is_not_counted():
    waited = AttemptRecord(1, 1, None, None, None, None, 1.6, None, 1.7, "error")
    assert rate_seen([*refused(1.0), *let_in(1.5), waited, *refused(2.0)]).admitted == 1


def bucket(per_second, start, end):
    """Admissions at a rate, one refusal after each."""
    gap = 1 / per_second
    calls = []
    for n in range(round((end - start) * per_second)):
        calls += [*let_in(start + n * gap), *refused(start + (n + 0.5) * gap)]
    return calls


def test_a_rate_that_changes_has_a_slowest_and_a_fastest_part():
    found = rate_seen([*bucket(2.0, 0.0, 60.0), *bucket(8.0, 60.0, 120.0)])
    assert found.slowest == pytest.approx(2.0, rel=0.05)
    assert found.fastest == pytest.approx(8.0, rel=0.05)
    assert found.per_second == pytest.approx(5.0, rel=0.02)
    same = rate_seen(bucket(5.0, 0.0, 120.0))
    assert same.slowest == pytest.approx(same.fastest, rel=0.02)


def test_a_few_calls_are_no_part_of_their_own():
    """Two quick ones among eighteen are chance, not a change."""
    found = rate_seen([*bucket(1.0, 0.0, 16.0), *bucket(100.0, 16.0, 16.02)])
    assert found.slowest == found.fastest


def test_a_limit_on_calls_at_once_refuses_at_that_many_in_flight():
    """3 at once, each of 1 s: a fourth is refused whenever three run, and let in whenever they do not."""
    calls = []
    for begin in range(10):
        calls += [*let_in(begin, begin + 0.05, begin + 0.1, seconds=0.8), *refused(begin + 0.2, begin + 0.3)]
    found = separation(calls)
    assert (found.let_in, found.refused_at) == (3, 3)
    assert found.share == 1.0
    assert found.clear


def test_a_limit_on_a_rate_refuses_whatever_is_in_flight():
    """8 a second, times between 0 and 2 s: about as much in flight at refusals as at admissions."""
    rng = random.Random(1)
    calls = [*refused(*(n / 8 + 0.06 for n in range(240)))]
    calls += [attempt(n / 8, seconds=rng.uniform(0, 2)) for n in range(240)]
    found = separation(calls)
    assert 0.45 < found.share < 0.8
    assert found.let_in > found.refused_at
    assert not found.clear


def test_ties_count_half():
    """Both always meet one in flight."""
    calls = [*let_in(0.0, seconds=100), *let_in(*range(1, 50), seconds=0.5), *refused(*(n + 0.7 for n in range(1, 50)))]
    assert separation(calls).share == pytest.approx((1 + 0.5 * 49) / 50)


@pytest.mark.parametrize("calls", [[], let_in(1.0, 2.0, 3.0), [*let_in(1.0, 2.0, 3.0), *refused(1.5, 2.5)]])
def test_too_few_calls_say_nothing_of_what_is_in_flight(calls):
    assert separation(calls) is None


@pytest.mark.parametrize(("share", "clear"), [(0.89, False), (0.9, True), (1.0, True), (0.5, False)])
def test_from_when_a_separation_is_clear(share, clear):
    assert Separation(share, 4, 4).clear is clear


def test_how_long_a_limit_closes_for_is_seen_between_admissions_and_at_the_end():
    assert closed_seconds(let_in(1.0, 9.0)) == 0, "nothing was refused"
    assert closed_seconds([*let_in(1.0), *refused(2.0, 5.0), *let_in(9.0, 20.0)]) == 8.0
    assert closed_seconds([*let_in(1.0), *refused(2.0, 5.0)]) == 4.0, "until the last refusal at least"
    assert closed_seconds(refused(2.0, 5.0)) == 0


@pytest.mark.parametrize(("slow_seconds", "refusing", "cut"), [(20, True, 20), (40, True, 0), (40, False, 40)])
def test_a_beginning_that_is_refused_for_long_is_no_warm_up(slow_seconds, refusing, cut):
    """Of 100 s: an emptied bucket soon has enough again, and a cold server refuses nothing."""
    slow = let_in(*(2.0 * n for n in range(slow_seconds // 2)))
    turned_away = refused(*(2.0 * n + 1 for n in range(slow_seconds // 2 if refusing else 0)))
    fast = let_in(*(slow_seconds + 0.2 * n for n in range(5 * (100 - slow_seconds))))
    window, steady = settled_part(Records([], [*slow, *turned_away, *fast]), Window(0.0, 100.0, 1.0))
    assert window.start == pytest.approx(cut, abs=4.0)
    assert window.warm_up_seconds == pytest.approx(1.0 + window.start)
    assert steady is (cut > 0)


@pytest.mark.parametrize(("paced", "times", "cut"), [
    (True, [1.0, 4.0, 9.0, 12.0, 60.0], 12),
    (True, [1.0, 4.0, 9.0, 12.0, *(15.0 + 5 * n for n in range(17))], 0),
    (True, [30.0, 60.0], 0),
    (False, [1.0, 4.0, 9.0, 12.0, 60.0], 0),
])  # fmt: skip
def test_at_a_pace_what_an_emptied_bucket_refuses_at_first_is_left_out(paced, times, cut):
    even = let_in(*(0.5 * n - 1 for n in range(200)))
    window, _ = settled_part(Records([], [*even, *refused(*times)]), Window(0.0, 100.0, 1.0), paced=paced)
    assert window.start == pytest.approx(cut, abs=0.1)
