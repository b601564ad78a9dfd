"""Classes, ageing, fair share and depth."""

import itertools
import random
from collections import Counter

import pytest

from llmq.core import (
    Cap,
    Depth,
    Drop,
    FairShare,
    FrontJob,
    Job,
    LLMTaskMeta,
    Outcome,
    Policy,
    Priority,
    Rate,
    Scheduler,
    State,
)

LOW, NORMAL, HIGH, URGENT = Priority.LOW, Priority.NORMAL, Priority.HIGH, Priority.URGENT
SUCCEEDED = Outcome.SUCCEEDED


def make(limit=1, *limits, **options):
    return Scheduler(Policy(limit, limits, **options))


def job(priority=NORMAL, *, labels=None, **meta):
    return Job(LLMTaskMeta(priority=priority, labels=labels or {}, **meta))


def under_a_stream_of(better, scheduler, waiting, seconds=1.0, model=None, until=200.0):
    """Keep a better class waiting all the time, each job taking `seconds`: when each of `waiting` starts."""
    now, started = 0.0, {}
    running = [job(better, model_name=model) for _ in range(scheduler.limit)]
    for each in [*running, job(better, model_name=model), *waiting]:
        scheduler.submit(each, now)
    while now < until and len(started) < len(waiting):
        now += seconds
        following = []
        for each in running:
            scheduler.submit(job(better, model_name=model), now)
            for new in scheduler.finish(each, SUCCEEDED, now):
                following.append(new)
                if new in waiting:
                    started[new] = now
        scheduler.check()
        running = following
    return [started.get(each) for each in waiting]


def test_low_starts_within_the_stated_bound_under_a_stream_of_urgent():
    (at,) = under_a_stream_of(URGENT, make(1, ageing_seconds=20), [job(LOW)])
    assert 20 <= at <= 20 + 4


def test_each_class_below_gets_its_turn():
    waiting = [job(LOW), job(NORMAL), job(HIGH), job(LOW)]
    started = under_a_stream_of(URGENT, make(1, ageing_seconds=20), waiting)
    assert None not in started
    assert max(started) <= 20 + 4 * len(waiting)


def test_an_overdue_class_gets_every_fourth_start_and_not_more():
    scheduler = make(1, ageing_seconds=10)
    started = under_a_stream_of(URGENT, scheduler, [job(LOW) for _ in range(10)])
    gaps = [later - earlier for earlier, later in itertools.pairwise(started)]
    assert set(gaps) == {4.0}


def test_a_class_that_was_served_ages_anew():
    scheduler, now, found = make(1, ageing_seconds=20), 0.0, []
    running, low = job(URGENT), job(LOW)
    scheduler.submit(running, now)
    scheduler.submit(low, now)
    while len(found) < 2 and now < 100:
        now += 1.0
        scheduler.submit(job(URGENT), now)
        (running,) = scheduler.finish(running, SUCCEEDED, now)
        if running is low:
            found.append(now)
            scheduler.submit(low := job(LOW), now)
    assert 20 <= found[0] <= 24
    assert 20 <= found[1] - found[0] <= 24


def test_overdue_classes_take_turns():
    waiting = [job(priority) for priority in (LOW, NORMAL) for _ in range(3)]
    started = under_a_stream_of(URGENT, make(1, ageing_seconds=10), waiting)
    in_order = sorted(zip(started, waiting, strict=True), key=lambda start: start[0])
    assert [each.meta.priority for _, each in in_order] == [LOW, NORMAL] * 3


def test_ageing_holds_where_a_cap_binds_and_not_the_slots():
    scheduler = make(50, Cap(1, by="model_name"), ageing_seconds=20)
    running, low, now = job(URGENT, model_name="m"), job(LOW, model_name="m"), 0.0
    scheduler.submit(running, now)
    scheduler.submit(low, now)
    while low.state is State.WAITING and now < 100:
        now += 1.0
        scheduler.submit(job(URGENT, model_name="m"), now)
        (running,) = scheduler.finish(running, SUCCEEDED, now)
        scheduler.check()
    assert 20 <= now <= 24


def test_ageing_holds_where_a_rate_binds():
    scheduler = make(50, Rate(60, by="model_name"), ageing_seconds=20)
    low, now = job(LOW, model_name="m"), 0.0
    scheduler.submit(job(URGENT, model_name="m"), now)
    scheduler.submit(low, now)
    while low.state is State.WAITING and now < 100:
        scheduler.submit(job(URGENT, model_name="m"), now)
        scheduler.submit(job(URGENT, model_name="m"), now)
        now = scheduler.deadline
        scheduler.tick(now)
        scheduler.check()
    assert 20 <= now <= 25


@pytest.mark.parametrize("options", [{"ageing_seconds": None}, {"ageing_seconds": 5, "strict": frozenset({URGENT})}])
def test_a_strict_class_and_no_ageing_let_nothing_pass(options):
    assert under_a_stream_of(URGENT, make(1, **options), [job(LOW)]) == [None]


def test_ageing_passes_a_class_that_is_not_strict():
    scheduler = make(1, ageing_seconds=5, strict=frozenset({URGENT}))
    assert under_a_stream_of(HIGH, scheduler, [job(LOW)]) != [None]


def served(scheduler, jobs, rounds, tokens_used=None):
    """Which service each start belonged to, while all have something waiting."""
    for each in jobs:
        scheduler.submit(each, 0.0)
    running = [each for each in jobs if each.state is State.RUNNING]
    found = []
    while len(found) < rounds:
        each = running.pop(0)
        found.append(each)
        each.used_tokens = tokens_used(each) if tokens_used else None
        running += scheduler.finish(each, SUCCEEDED, 0.0)
        scheduler.check()
    return found


@pytest.mark.parametrize("limit", [1, 7])
def test_weights_of_3_to_1_give_3_to_1(limit):
    scheduler = make(limit, fair_share=FairShare("service_id", weights={"a": 3}))
    jobs = [job(service_id=name) for name in "ab" for _ in range(1000)]
    count = Counter(each.meta.service_id for each in served(scheduler, jobs, 800))
    assert count["a"] / count["b"] == pytest.approx(3, rel=0.05)


def test_weights_hold_where_a_cap_or_a_rate_binds():
    for limit in (Cap(2, by="model_name"), Cap(2)):
        scheduler = make(50, limit, fair_share=FairShare("service_id", weights={"a": 3}))
        jobs = [job(service_id=name, model_name="m") for name in "ab" for _ in range(1000)]
        count = Counter(each.meta.service_id for each in served(scheduler, jobs, 800))
        assert count["a"] / count["b"] == pytest.approx(3, rel=0.05)


def test_shares_by_tokens_count_what_was_really_used():
    scheduler = make(1, fair_share=FairShare("service_id", of="tokens"))
    jobs = [job(service_id=name, tokens=10) for name in "ab" for _ in range(1000)]
    found = served(scheduler, jobs, 800, lambda each: 30 if each.meta.service_id == "a" else 10)
    count = Counter(each.meta.service_id for each in found)
    assert count["b"] / count["a"] == pytest.approx(3, rel=0.05)


def test_a_share_that_is_not_used_goes_to_the_others_and_is_not_saved_up():
    scheduler = make(1, fair_share=FairShare("service_id"))
    alone = [job(service_id="a") for _ in range(200)]
    served(scheduler, alone, 100)
    late = [job(service_id="b") for _ in range(50)]
    for each in late:
        scheduler.submit(each, 0.0)
    running = [each for each in alone if each.state is State.RUNNING]
    found = []
    while len(found) < 40:
        running += scheduler.finish(running[0], SUCCEEDED, 0.0)
        found.append(running.pop(0).meta.service_id)
    assert Counter(found)["b"] == pytest.approx(20, abs=2)


def test_within_a_share_rank_and_arrival_decide():
    scheduler = make(1, fair_share=FairShare("service_id"))
    jobs = [job(service_id="a", rank=rank) for rank in (0, 5, 3, 4)]
    assert [each.meta.rank for each in served(scheduler, jobs, 4)] == [0, 3, 4, 5]


def test_overflow_reject_refuses_the_newest_and_says_the_figures():
    scheduler = make(1, Depth(2), overflow="reject")
    running, first, second, refused = [job() for _ in range(4)]
    for each in (running, first, second, refused):
        scheduler.submit(each, 0.0)
        scheduler.check()
    assert (refused.state, refused.drop) == (State.ENDED, Drop.FULL)
    assert scheduler.describe_depth(refused) == "2 of 2 waiting"
    assert scheduler.finish(running, SUCCEEDED, 1.0) == [first]
    scheduler.submit(after := job(), 1.0)
    assert after.state is State.WAITING
    assert scheduler.statistics(1.0).dropped[Drop.FULL] == 1


def test_overflow_drop_oldest_drops_the_oldest_of_the_lowest_class():
    scheduler = make(1, Depth(3), overflow="drop_oldest")
    running, urgent, old, older_low = job(), job(URGENT), job(), job(LOW)
    for each in (running, urgent, old, older_low):
        scheduler.submit(each, 0.0)
    assert scheduler.submit(job(), 1.0) == [older_low]
    assert older_low.drop is Drop.OLDEST
    assert scheduler.submit(job(HIGH), 1.0) == [old]
    scheduler.submit(worse := job(LOW), 1.0)
    assert worse.drop is Drop.FULL, "nothing better makes room for it"
    scheduler.check()


def test_overflow_wait_lets_callers_wait_at_the_door():
    scheduler = make(1, Depth(2))
    jobs = [job() for _ in range(6)]
    for each in jobs:
        scheduler.submit(each, 0.0)
        scheduler.check()
    found = scheduler.statistics(0.0)
    assert (found.in_flight, found.waiting, found.at_door) == (1, 2, 3)
    assert "at the door of a full queue (2 of 2 waiting)" in scheduler.explain(jobs[4], 0.0)
    assert scheduler.finish(jobs[0], SUCCEEDED, 1.0) == [jobs[1]]
    found = scheduler.statistics(0.0)
    assert (found.waiting, found.at_door) == (2, 2)
    assert scheduler.refuse(Drop.DRAINING, 2.0) == jobs[4:]
    scheduler.check()
    assert [each.state for each in jobs[2:4]] == [State.WAITING] * 2, "they were accepted"


def test_a_cancelled_waiter_gives_its_place_to_who_stands_at_the_door():
    scheduler = make(1, Depth(1))
    running, inside, left, next_in = [job() for _ in range(4)]
    for each in (running, inside, left, next_in):
        scheduler.submit(each, 0.0)
    for each, found in [(left, (1, 1)), (inside, (1, 0)), (next_in, (0, 0))]:
        assert scheduler.cancel(each, 1.0) == []
        scheduler.check()
        statistics = scheduler.statistics(1.0)
        assert (statistics.waiting, statistics.at_door) == found


def test_who_stands_at_the_door_is_not_overtaken_by_its_like():
    scheduler = make(4, Depth(1), Cap(1, by="model_name"))
    a = [job(model_name="a") for _ in range(3)]
    b = [job(model_name="b") for _ in range(2)]
    for each in [*a, *b]:
        scheduler.submit(each, 0.0)
    assert b[1].sequence in scheduler._at_door
    assert scheduler.finish(b[0], SUCCEEDED, 1.0) == [b[1]], "a queue full of others does not hold it up"
    scheduler.check()


def test_depth_by_key_bounds_each_key():
    scheduler = make(1, Depth(1, by="service_id", overrides={"big": 3}), overflow="reject")
    scheduler.submit(job(), 0.0)
    drops = []
    for name in ["a", "a", "b", "big", "big", "big", "big"]:
        each = job(service_id=name)
        scheduler.submit(each, 0.0)
        drops.append(each.drop)
    assert drops == [None, Drop.FULL, None, None, None, None, Drop.FULL]


def test_a_retried_attempt_is_never_refused():
    scheduler = make(1, Depth(1), overflow="reject")
    scheduler.submit(job(), 0.0)
    scheduler.submit(job(), 0.0)
    scheduler.submit(again := FrontJob(), 0.0)
    assert again.state is State.WAITING
    scheduler.check()


def test_a_depth_that_is_set_later_takes_the_oldest_in_and_counts_no_retried_attempt():
    scheduler = make(1)
    running, old, low, retried, young = job(), job(), job(LOW), FrontJob(), job()
    for each in (running, old, low, retried, young):
        scheduler.submit(each, 0.0)
    assert scheduler.reconfigure(Policy(1, (Depth(2),)), 1.0) == []
    scheduler.check()
    assert list(scheduler._at_door) == [young.sequence]
    assert scheduler.statistics(1.0).waiting == 3


def test_a_call_that_can_start_needs_no_place():
    scheduler = make(2, Depth(0), overflow="reject")
    first, second, third = job(), job(), job()
    for each in (first, second, third):
        scheduler.submit(each, 0.0)
    assert (first.state, second.state, third.drop) == (State.RUNNING, State.RUNNING, Drop.FULL)


@pytest.mark.parametrize(
    ("make_share", "message"),
    [
        (lambda: FairShare(""), "goes by the name of a field or label"),
        (lambda: FairShare("a", of="calories"), "of calls or tokens; got of='calories'"),
        (lambda: FairShare("a", weights={"x": 0}), "the weight of a x must be a number more than 0, got 0"),
    ],
)
def test_what_is_no_share_is_refused(make_share, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make_share()


def test_a_class_goes_on_ageing_though_better_ranks_come_to_its_head():
    scheduler, now = make(1, ageing_seconds=60), 0.0
    running = job(HIGH)
    scheduler.submit(running, now)
    low = [job(LOW, rank=100)]
    scheduler.submit(low[0], now)
    while now < 1000:
        now += 1.0
        if now % 50 == 0:
            low.append(job(LOW, rank=100 - len(low)))
            scheduler.submit(low[-1], now)
        scheduler.submit(job(HIGH), now)
        (running,) = scheduler.finish(running, SUCCEEDED, now)
    assert sum(each.state is State.ENDED for each in low) >= len(low) - 2


def test_two_rates_by_different_keys_and_ageing_do_not_pass_a_lane_to_and_fro():
    limits = (
        Rate(600, per="second", of="tokens", by="model_name", burst=300),
        Rate(100, per="second", of="tokens", by="service_id", burst=300),
    )
    for seed in range(150):
        rng, now = random.Random(seed), 0.0
        scheduler = make(1000, *limits, ageing_seconds=1.0)
        for _ in range(120):
            tokens, priority = rng.choice([1, 5, 60, 300]), rng.choice([HIGH, NORMAL, LOW])
            each = job(priority, tokens=tokens, model_name=rng.choice("ab"), service_id=rng.choice("xy"))
            scheduler.submit(each, now)
            if rng.random() < 0.4:
                now += rng.choice([0.01, 0.3, 1.5])
                scheduler.tick(now)
        scheduler.check()


def test_what_was_settled_counts_in_the_share_both_ways():
    scheduler = make(1, fair_share=FairShare("service_id", of="tokens"))
    jobs = [job(service_id=name, tokens=1000 if name == "a" else 100) for name in "ab" for _ in range(1000)]
    count = Counter(each.meta.service_id for each in served(scheduler, jobs, 800, lambda each: 100))
    assert count["a"] / count["b"] == pytest.approx(1, rel=0.05)


def test_one_newcomer_pushes_out_one_where_that_makes_room_in_both_bounds():
    scheduler = make(1, Depth(4), Depth(2, by="service_id"), overflow="drop_oldest")
    scheduler.submit(job(), 0.0)
    others = [job(service_id=name) for name in "bbxx"]
    for each in others:
        scheduler.submit(each, 0.0)
    assert scheduler.submit(job(service_id="x"), 1.0) == [others[2]]
    assert scheduler.statistics(1.0).waiting == 4
    scheduler.check()


def test_what_is_gone_from_a_shut_door_does_not_pile_up():
    scheduler = make(1, Depth(0))
    scheduler.submit(job(), 0.0)
    for _ in range(2000):
        each = job()
        scheduler.submit(each, 0.0)
        scheduler.cancel(each, 0.0)
    assert sum(len(places.door) for places in scheduler._registry.places.values()) < 100
