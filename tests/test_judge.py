"""A small sample of `make judge`: four of its twelve providers, one seed each, against truths from the spec.

A call takes 2 s on average; so a level N that nothing holds back brings N / 2 a second (Little's law).
"""

import pytest

from benchmarks import judge
from benchmarks.judge import LEVELS, SHAPES, Truth, refuses_when_short
from llmq.tune.point import Setting


def up_to(slots, share_of_good=1.0):
    """N / 2 up to so many slots, then level. 97 % of the most takes them all, but for less than one in 33."""
    by_level = {n: share_of_good * min(n, slots) / 2 for n in LEVELS}
    return Truth(max(by_level.values()), Setting(slots), slots, by_level)


TRUTHS = {
    "server queueing": up_to(16),
    "concurrency limit": up_to(24),
    # 600 a minute are 10 a second. Starts come 0.1 s apart, so 20 are in flight on average, give or take 2 to 3: a
    # start now and then waits for a slot. Runs of 6,000 calls bring 9.63 a second with 22 slots and 9.79 with 23.
    "requests": Truth(10.0, Setting(64, 600), 23, {n: min(n / 2, 10.0) for n in LEVELS}),
    # One attempt in a hundred fails after its service time; a random refusal is over in 5 ms.
    "random errors": up_to(24, 0.99),
}


@pytest.fixture(autouse=True)
def _shorter_long_runs(monkeypatch):
    monkeypatch.setattr(judge, "HELD_CALLS", 6_000)


@pytest.mark.parametrize("name", TRUTHS)
def test_what_a_sweep_recommends_is_good_small_clean_and_names_what_binds(name):
    verdict = judge.judge(SHAPES[name], 0, TRUTHS[name])
    assert (verdict.good, verdict.small, verdict.clean) == (True, True, True), verdict.said
    assert verdict.binds == SHAPES[name].binds, verdict.said
    assert verdict.calls >= 7 * judge.CALLS == 14_000, "seven levels of 2,000 calls"


@pytest.mark.parametrize("name", TRUTHS)
def test_a_sweep_of_150_calls_says_that_it_cannot_tell(name):
    assert refuses_when_short(SHAPES[name], 0)
