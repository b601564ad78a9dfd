import itertools

import pytest

from llmq.core import Cap, Job, LLMTaskMeta, Outcome, Policy, Priority, Rate, Scheduler, State

SUCCEEDED, REJECTED, IGNORED = Outcome.SUCCEEDED, Outcome.REJECTED, Outcome.IGNORED


def make(*limits, limit=1000, **options):
    return Scheduler(Policy(limit, limits, **options))


def job(tokens=None, model=None, **meta):
    return Job(LLMTaskMeta(model_name=model, tokens=tokens, **meta))


def starts(scheduler, jobs, until=1e9, seconds=0.0, used=None):
    """Submit at 0, follow every deadline, end each job `seconds` after its start: (time, job) of each start."""
    found, ends = [], []
    for each in jobs:
        scheduler.submit(each, 0.0)
    running = [each for each in jobs if each.state is State.RUNNING]
    now = 0.0
    while True:
        for each in running:
            found.append((now, each))
            ends.append((now + seconds, each))
        ends.sort(key=lambda end: end[0])
        moments = [end[0] for end in ends[:1]] + ([] if scheduler.deadline is None else [scheduler.deadline])
        if not moments or min(moments) > until:
            return found
        now = min(moments)
        running = []
        while ends and ends[0][0] <= now:
            each = ends.pop(0)[1]
            each.used_tokens = used
            running += scheduler.finish(each, SUCCEEDED, now)
        running += scheduler.tick(now)
        scheduler.check()


def most_in_a_window(times, seconds):
    """The most starts in any half-open window."""
    most, first = 0, 0
    for last, time in enumerate(times):
        while times[first] <= time - seconds:
            first += 1
        most = max(most, last - first + 1)
    return most


@pytest.mark.parametrize("burst", [0, 1, 10, 25])
def test_a_rate_lets_in_what_it_says_and_not_one_more(burst):
    found = starts(make(Rate(600, burst=burst)), [job() for _ in range(3000)])
    times = [time for time, _ in found]
    assert len(times) == 3000
    assert most_in_a_window(times, 60.0) <= 600 + burst
    assert times[-1] == pytest.approx((3000 - max(1, burst)) / 10, rel=1e-6)
    assert 0.99 * 10 * times[-1] <= 3000


def test_with_no_burst_starts_are_paced_evenly():
    times = [time for time, _ in starts(make(Rate(120)), [job() for _ in range(5)])]
    assert times == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0], abs=1e-6)


@pytest.mark.parametrize(("per", "seconds"), [("second", 1), ("minute", 60), ("hour", 3600), ("day", 86400)])
def test_rates_are_per_second_minute_hour_and_day(per, seconds):
    times = [time for time, _ in starts(make(Rate(4, per=per)), [job() for _ in range(9)])]
    assert times[-1] == pytest.approx(2 * seconds)


def test_a_rate_by_key_holds_its_key_back_and_no_other():
    scheduler = make(Rate(60, by="model_name", overrides={"fast": 600}))
    slow = [job(model="slow") for _ in range(3)]
    fast = [job(model="fast") for _ in range(11)]
    found = starts(scheduler, slow + fast)
    assert max(time for time, each in found if each in fast) == pytest.approx(1.0)
    assert max(time for time, each in found if each in slow) == pytest.approx(2.0)


def test_what_waits_says_for_what_and_how_long():
    scheduler = make(Rate(600, of="tokens", by="model_name"))
    first, second = job(100, "m"), job(50, "m")
    scheduler.submit(first, 0.0)
    scheduler.submit(second, 0.0)
    assert scheduler.explain(second, 6.8) == "waits for tokens per minute for model_name m, ready in 3.2 s"
    scheduler.finish(first, SUCCEEDED, 6.8)
    assert scheduler.tick(10.1) == [second]


def test_tokens_are_reserved_and_settled_both_ways():
    for used, ready_at in [(None, 10.0), (40, 4.0), (160, 16.0)]:
        scheduler = make(Rate(600, of="tokens"))
        first, second = job(100), job(1)
        scheduler.submit(first, 0.0)
        first.used_tokens = used
        scheduler.finish(first, SUCCEEDED, 1.0)
        scheduler.submit(second, 1.0)
        assert second.state is State.WAITING
        assert scheduler.deadline == pytest.approx(ready_at)


@pytest.mark.parametrize(("outcome", "ready_at"), [(REJECTED, 0.0), (IGNORED, 10.0), (SUCCEEDED, 10.0)])
def test_a_refused_call_has_used_no_tokens_and_any_other_what_was_reserved(outcome, ready_at):
    scheduler = make(Rate(600, of="tokens", burst=5))
    first, second = job(105), job(5)
    scheduler.submit(first, 0.0)
    scheduler.finish(first, outcome, 0.5)
    scheduler.submit(second, 0.5)
    if not ready_at:
        assert second.state is State.RUNNING
    else:
        assert scheduler.deadline == pytest.approx(ready_at + 0.5)


def test_a_call_that_never_began_gives_back_its_request_and_its_tokens():
    scheduler = make(Rate(60), Rate(600, of="tokens", by="model_name"), Cap(1))
    first, second = job(100), job(100)
    scheduler.submit(first, 0.0)
    scheduler.submit(second, 0.0)
    assert scheduler.cancel(first, 0.0) == [second]
    scheduler.check()


def test_a_refused_request_was_a_request():
    scheduler = make(Rate(60))
    first, second = job(), job()
    scheduler.submit(first, 0.0)
    scheduler.finish(first, REJECTED, 0.1)
    scheduler.submit(second, 0.1)
    assert scheduler.deadline == pytest.approx(1.0)


def test_a_call_larger_than_the_bucket_starts_alone_when_it_is_full_and_later_ones_pay():
    scheduler = make(Rate(600, of="tokens", burst=50))
    small, large, next_small = job(20), job(200), job(10)
    found = starts(scheduler, [small, large, next_small])
    assert [each for _, each in found] == [small, large, next_small]
    times = [time for time, _ in found]
    assert times[1] == pytest.approx(2.0), "full again: 20 tokens at 10 a second"
    assert times[2] == pytest.approx(2.0 + (150 + 10) / 10), "a debt of 150, and its own 10"


def test_size_never_starves_a_large_call_beside_small_ones():
    scheduler = make(Rate(6000, of="tokens", burst=100))
    ahead = [job(10) for _ in range(30)]
    large = job(1000)
    found = starts(scheduler, [*ahead, large, *[job(1) for _ in range(500)]])
    at = next(time for time, each in found if each is large)
    assert at <= (30 * 10 + 1000) / 100
    assert [each for _, each in found[:31]] == [*ahead, large], "strict order"


def test_small_calls_that_keep_coming_do_not_pass_a_large_one_that_waits():
    scheduler = make(Rate(6000, of="tokens", burst=100), Cap(3, by="service_id"))
    scheduler.submit(job(100), 0.0)
    large = job(80, service_id="large")
    scheduler.submit(large, 0.0)
    for number in itertools.count(1):
        now = number * 0.05
        small = job(1, service_id=f"s{number % 7}")
        woken = scheduler.submit(small, now)
        scheduler.check()
        if large in woken:
            break
        assert small.state is State.WAITING
    assert now <= 0.86


def test_a_large_call_that_is_cancelled_lets_a_small_one_go_at_once():
    scheduler = make(Rate(600, of="tokens", burst=10))
    scheduler.submit(job(10), 0.0)
    large, small = job(10), job(2, priority=Priority.LOW)
    scheduler.submit(large, 0.0)
    scheduler.submit(small, 0.0)
    assert scheduler.tick(0.3) == []
    assert scheduler.cancel(large, 0.3) == [small]


def test_a_better_class_goes_first_and_takes_what_is_there():
    scheduler = make(Rate(600, of="tokens", burst=10))
    scheduler.submit(job(10), 0.0)
    low, urgent = job(10, priority=Priority.LOW), job(2, priority=Priority.URGENT)
    scheduler.submit(low, 0.0)
    scheduler.submit(urgent, 0.0)
    assert scheduler.tick(0.21) == [urgent]
    assert scheduler.tick(1.21) == [low]


def test_an_estimate_that_is_missing_is_learnt_from_what_was_used():
    scheduler = make(Rate(600, of="tokens"))
    first, second, third = job(), job(), job()
    scheduler.submit(first, 0.0)
    first.used_tokens = 60
    scheduler.finish(first, SUCCEEDED, 1.0)
    scheduler.submit(second, 100.0)
    scheduler.submit(third, 100.0)
    assert (second.state, third.state) == (State.RUNNING, State.WAITING)
    assert scheduler.deadline == pytest.approx(106.0)


def test_a_timer_that_comes_late_is_caught_up_with_but_not_for_long():
    scheduler = make(Rate(600))
    for _ in range(100):
        scheduler.submit(job(), 0.0)
    late = 0.03
    now, count = 0.0, 1
    while scheduler.deadline is not None and now < 5:
        now = scheduler.deadline + late
        count += len(scheduler.tick(now))
    assert count == pytest.approx(5.0 * 10, abs=2)
    assert len(scheduler.tick(now + 100.0)) <= 4, "after a long sleep no herd"


def test_what_a_rest_saved_up_is_the_burst_and_no_more():
    scheduler = make(Rate(600, burst=3))
    first = [job() for _ in range(3)]
    for each in first:
        scheduler.submit(each, 0.0)
    later = [job() for _ in range(8)]
    for each in later:
        scheduler.submit(each, 1000.0)
    assert sum(each.state is State.RUNNING for each in later) == 3


def test_what_is_given_back_to_a_full_bucket_is_lost():
    scheduler = make(Rate(600, of="tokens", burst=50))
    first, second, third = job(40), job(50), job(50)
    scheduler.submit(first, 0.0)
    first.used_tokens = 0
    scheduler.finish(first, SUCCEEDED, 100.0)
    scheduler.submit(second, 100.0)
    scheduler.submit(third, 100.0)
    assert (second.state, third.state) == (State.RUNNING, State.WAITING)
    assert scheduler.deadline == pytest.approx(105.0)


def test_a_clock_that_goes_back_makes_nobody_wait_longer():
    scheduler = make(Rate(60), limit=5)
    scheduler.submit(job(), 1e6)
    waiting = job()
    scheduler.submit(waiting, 1e6)
    assert scheduler.deadline == pytest.approx(1e6 + 1)
    assert scheduler.tick(50.0) == []
    assert scheduler.deadline == pytest.approx(51.0)
    scheduler.check()
    assert scheduler.tick(51.1) == [waiting]


def test_a_rate_that_is_changed_keeps_its_debt():
    scheduler = make(Rate(60))
    first, second = job(), job()
    scheduler.submit(first, 0.0)
    scheduler.submit(second, 0.0)
    assert scheduler.reconfigure(Policy(1000, (Rate(6),)), 0.5) == []
    assert scheduler.deadline == pytest.approx(5.5)
    scheduler.reconfigure(Policy(1000, (Rate(600),)), 1.0)
    assert scheduler.tick(1.1) == [second]


@pytest.mark.parametrize(
    ("make_limit", "message"),
    [
        (lambda: Rate(0), "a rate must be more than 0, got 0"),
        (lambda: Rate("500"), "a rate is a number, got '500'"),
        (lambda: Rate(5, per="week"), "per second, minute, hour, day; got per='week'"),
        (lambda: Rate(5, of="words"), "requests or tokens; got of='words'"),
        (lambda: Rate(5, burst=-1), "a burst is a number of requests, at least 0; got -1"),
        (lambda: Rate(5, overrides={"m": 7}), "no overrides; say by which"),
        (lambda: Rate(5, by="model_name", overrides={"m": 0}), "a rate for model_name m must be more than 0"),
        (lambda: Cap(0), "a cap must be at least 1, got 0"),
        (lambda: Cap(2.5), "a cap is a whole number, got 2.5"),
        (lambda: Cap(True), "a cap is a whole number, got True"),
        (lambda: Cap(2, by=""), "goes by the name of a field or label, got by=''"),
        (lambda: Policy(2, (Cap(2), Cap(3))), "two limits of the same kind"),
        (lambda: Policy(2, (5,)), "limits are Cap, Rate or Depth values, got 5"),
        (lambda: Policy(2, overflow="block"), "overflow is wait, reject or drop_oldest; got 'block'"),
        (lambda: Policy(2, ageing_seconds=-1), "ageing_seconds must be at least 0"),
    ],
)
def test_what_is_no_limit_is_refused_with_the_value(make_limit, message):
    with pytest.raises((ValueError, TypeError), match=message.replace("(", r"\(").replace("?", r"\?")):
        make_limit()


def test_two_changes_in_a_row_forget_no_debt():
    scheduler = make(Rate(1, per="day", by="model_name", burst=5))
    for _ in range(5):
        scheduler.submit(job(model="m"), 0.0)
    for _ in range(2):
        scheduler.reconfigure(scheduler.policy, 1.0)
    scheduler.submit(last := job(model="m"), 2.0)
    assert last.state is State.WAITING


def test_a_rate_that_came_later_is_paid_nothing_by_who_ran_already():
    scheduler = make(Cap(50))
    running = job(1000)
    scheduler.submit(running, 0.0)
    scheduler.reconfigure(Policy(1000, (Rate(60, of="tokens", burst=1000),)), 0.0)
    scheduler.submit(job(1000), 0.0)
    running.used_tokens = 0
    scheduler.finish(running, SUCCEEDED, 0.0)
    scheduler.submit(late := job(1000), 0.0)
    assert late.state is State.WAITING


def test_a_change_that_cannot_be_changes_nothing():
    scheduler = make(limit=1)
    first, second = job(), Job(LLMTaskMeta(labels={"tags": ["a list"]}))
    scheduler.submit(first, 0.0)
    scheduler.submit(second, 0.0)
    with pytest.raises(TypeError, match="unhashable"):
        scheduler.reconfigure(Policy(5, (Cap(1, by="tags"),)), 1.0)
    scheduler.check()
    assert scheduler.limit == 1
    assert scheduler.finish(first, SUCCEEDED, 2.0) == [second]


def test_a_rate_that_comes_back_after_the_clock_went_back_still_refills():
    rate = Rate(60, by="model_name")  # one a second
    scheduler = Scheduler(Policy(9, (rate,)))
    meta = LLMTaskMeta(model_name="m")
    for _ in range(3):
        scheduler.submit(Job(meta), 5000.0)
    scheduler.tick(5001.0)
    scheduler.reconfigure(Policy(9, (Cap(9),)), 5001.0)
    scheduler.tick(1000.0)
    scheduler.reconfigure(Policy(9, (rate,)), 1000.0)
    late = Job(meta)
    scheduler.submit(late, 1000.0)
    for _ in range(3):
        if late.state is State.WAITING:
            scheduler.tick(scheduler.deadline)
    assert late.state is State.RUNNING
