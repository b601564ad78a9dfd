import pytest

from llmq.core import (
    Cap,
    Drop,
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


def make(limit=1, *limits, **options):
    return Scheduler(Policy(limit, limits, **options))


def job(name=None, *, front=False, labels=None, **meta):
    return (FrontJob if front else Job)(LLMTaskMeta(name, labels=labels or {}, **meta))


def submit_all(scheduler, jobs, now=0.0):
    for each in jobs:
        scheduler.submit(each, now)
        scheduler.check()
    return jobs


def run_out(scheduler, running, now=0.0):
    """End what runs, one after the other; the jobs that this lets start, in order."""
    order = []
    running = list(running)
    while running:
        for started in scheduler.finish(running.pop(0), Outcome.SUCCEEDED, now):
            order.append(started)
            running.append(started)
        scheduler.check()
    return order


def test_starts_up_to_the_limit_and_then_queues():
    scheduler = make(2)
    first, second, third = Job(), Job(), Job()
    for each in (first, second, third):
        assert scheduler.submit(each, 1.0) == ()
    assert [each.state for each in (first, second, third)] == [State.RUNNING, State.RUNNING, State.WAITING]
    assert third.started_at is None
    assert scheduler.finish(first, Outcome.SUCCEEDED, 3.0) == [third]
    assert (third.submitted_at, third.started_at) == (1.0, 3.0)
    scheduler.check()


def test_order_is_priority_then_front_then_rank_then_arrival():
    scheduler = make(1)
    running = Job()
    scheduler.submit(running, 0.0)
    jobs = submit_all(
        scheduler,
        [
            job("low", priority=LOW),
            job("late rank", rank=7),
            job("early rank", rank=1),
            job("same rank, later", rank=1),
            job("retried", rank=9, front=True),
            job("retried low", priority=LOW, front=True),
            job("urgent", priority=URGENT, rank=99),
            job("high", priority=HIGH),
        ],
    )
    assert [started.meta.stage for started in run_out(scheduler, [running])] == [
        "urgent",
        "high",
        "retried",
        "early rank",
        "same rank, later",
        "late rank",
        "retried low",
        "low",
    ]
    assert all(each.state is State.ENDED for each in jobs)


def test_a_lower_limit_is_reached_as_jobs_end_and_a_higher_one_at_once():
    scheduler = make(3)
    jobs = submit_all(scheduler, [Job() for _ in range(5)])
    assert scheduler.resize(1, 0.0) == []
    assert list(scheduler.finish(jobs[0], Outcome.SUCCEEDED, 1.0)) == []
    assert list(scheduler.finish(jobs[1], Outcome.SUCCEEDED, 1.0)) == []
    assert list(scheduler.finish(jobs[2], Outcome.SUCCEEDED, 1.0)) == [jobs[3]]
    assert scheduler.resize(8, 2.0) == [jobs[4]]


def test_a_pause_starts_nothing_and_its_end_everything_that_fits():
    scheduler = make(2)
    scheduler.pause(True, 0.0)
    jobs = submit_all(scheduler, [Job() for _ in range(3)])
    assert "resume()" in scheduler.explain(jobs[0], 0.0)
    assert scheduler.pause(False, 1.0) == jobs[:2]


def test_a_cap_by_key_blocks_its_key_and_no_other():
    scheduler = make(10, Cap(2, by="model_name", overrides={"small": 1}))
    big = submit_all(scheduler, [job(model_name="big") for _ in range(4)])
    small = submit_all(scheduler, [job(model_name="small") for _ in range(2)])
    assert [each.state for each in big] == [State.RUNNING] * 2 + [State.WAITING] * 2
    assert [each.state for each in small] == [State.RUNNING, State.WAITING]
    assert "one of 1 calls at once for model_name small" in scheduler.explain(small[1], 0.0)
    assert scheduler.explain(big[3], 0.0).endswith("with 1 like it before it")
    assert scheduler.finish(big[0], Outcome.SUCCEEDED, 1.0) == [big[2]]
    assert scheduler.finish(small[0], Outcome.SUCCEEDED, 1.0) == [small[1]]


def test_a_cap_looks_in_the_fields_and_then_in_the_labels():
    scheduler = make(10, Cap(1, by="agent"), Cap(1, by="service_id"))
    writer, again, other, none, none_again = submit_all(
        scheduler,
        [
            job(labels={"agent": "writer"}, service_id="a"),
            job(labels={"agent": "writer"}, service_id="b"),
            job(labels={"agent": "reader"}, service_id="c"),
            job(service_id="d"),
            job(service_id="e"),
        ],
    )
    assert [each.state for each in (writer, again, other, none, none_again)] == [
        State.RUNNING,
        State.WAITING,
        State.RUNNING,
        State.RUNNING,
        State.WAITING,
    ], "who lacks the label counts with the others who do"


def test_several_caps_all_count():
    scheduler = make(10, Cap(3), Cap(2, by="model_name"), Cap(1, by="service_id"))
    jobs = submit_all(scheduler, [job(model_name=m, service_id=s) for m in "ab" for s in "xyz"])
    running = [(each.meta.model_name, each.meta.service_id) for each in jobs if each.state is State.RUNNING]
    assert running == [("a", "x"), ("a", "y"), ("b", "z")]
    started = list(scheduler.finish(jobs[0], Outcome.SUCCEEDED, 1.0))
    assert [(each.meta.model_name, each.meta.service_id) for each in started] == [("b", "x")]


def test_an_offer_is_passed_on_when_something_else_blocks_who_got_it():
    scheduler = make(10, Cap(1, by="model_name"), Cap(1, by="agent"))
    on_model, on_agent, blocked_twice, second = submit_all(
        scheduler,
        [
            job(model_name="m", labels={"agent": "z"}),
            job(model_name="n", labels={"agent": "x"}),
            job(model_name="m", labels={"agent": "x"}),
            job(model_name="m", labels={"agent": "y"}),
        ],
    )
    assert scheduler.finish(on_model, Outcome.SUCCEEDED, 1.0) == [second]
    scheduler.check()
    assert list(scheduler.finish(on_agent, Outcome.SUCCEEDED, 2.0)) == [], "now it is the model that blocks"
    assert scheduler.finish(second, Outcome.SUCCEEDED, 3.0) == [blocked_twice]


def test_a_hold_keeps_its_model_back_until_its_time_and_no_other():
    scheduler = make(1)
    running, held, free = submit_all(
        scheduler, [job(model_name="a"), job(model_name="a"), job(model_name="b", priority=LOW)]
    )
    scheduler.hold("a", 10.0, 1.0)
    assert scheduler.statistics(1.0).held_keys == ("a",)
    assert scheduler.finish(running, Outcome.REJECTED, 1.0) == [free]
    assert list(scheduler.finish(free, Outcome.SUCCEEDED, 2.0)) == []
    assert "Retry-After for model_name a, over in 8.0 s" in scheduler.explain(held, 2.0)
    scheduler.hold("a", 5.0, 2.0)
    assert scheduler.deadline == 10.0, "an earlier end does not shorten it"
    assert scheduler.tick(9.9) == []
    assert scheduler.tick(10.0) == [held]
    assert scheduler.statistics(10.0).held_keys == ()
    assert scheduler.deadline is None


def test_a_shorter_hold_does_not_end_a_longer_one():
    scheduler = make(1)
    scheduler.hold("a", 10.0, 0.0)
    scheduler.hold("a", 5.0, 1.0)
    assert scheduler.statistics(6.0).held_keys == ("a",)
    scheduler.submit(held := job(model_name="a"), 6.0)
    assert (held.state, scheduler.deadline) == (State.WAITING, 10.0)


def test_after_a_hold_all_that_it_kept_back_may_go():
    scheduler = make(3)
    scheduler.hold(None, 5.0, 0.0)
    jobs = submit_all(scheduler, [Job() for _ in range(5)])
    assert [each.state for each in jobs] == [State.WAITING] * 5
    assert scheduler.tick(5.0) == jobs[:3]
    assert run_out(scheduler, jobs[:3], 6.0) == jobs[3:]
    scheduler.submit(last := Job(), 7.0)
    assert last.state is State.RUNNING


def test_ending_twice_counts_once():
    scheduler = make(1)
    running, waiting = submit_all(scheduler, [Job(), Job()])
    assert scheduler.finish(running, Outcome.SUCCEEDED, 1.0) == [waiting]
    assert scheduler.finish(running, Outcome.REJECTED, 1.0) is None
    assert scheduler.cancel(running, 1.0) == []
    assert scheduler.statistics(1.0).ended == {Outcome.SUCCEEDED: 1, Outcome.IGNORED: 0, Outcome.REJECTED: 0}


def test_a_job_that_was_to_run_and_never_began_is_abandoned():
    scheduler = make(1)
    first, second = submit_all(scheduler, [Job(), Job()])
    assert scheduler.cancel(first, 1.0) == [second]
    found = scheduler.statistics(1.0)
    assert (found.abandoned, found.in_flight, sum(found.ended.values())) == (1, 1, 0)


def test_statistics_add_up_and_name_the_oldest_wait():
    scheduler = make(1, Cap(1, by="agent"))
    first, second, third = Job(), job(priority=LOW, labels={"agent": "w"}), job(model_name="m")
    scheduler.submit(first, 10.0)
    scheduler.submit(second, 11.0)
    scheduler.submit(third, 12.0)
    found = scheduler.statistics(15.0)
    assert (found.limit, found.in_flight, found.waiting, found.submitted, found.abandoned) == (1, 1, 2, 3, 0)
    assert found.oldest_wait_seconds == 4.0
    assert (found.by_class[LOW].waiting, found.by_class[LOW].oldest_wait_seconds) == (1, 4.0)
    assert (found.by_class[NORMAL].waiting, found.by_class[NORMAL].in_flight) == (1, 1)
    assert {key: counts.waiting for key, counts in found.by_key["model_name"].items()} == {None: 1, "m": 1}
    assert {key: counts.waiting for key, counts in found.by_key["agent"].items()} == {None: 1, "w": 1}
    scheduler.finish(first, Outcome.REJECTED, 15.0)
    scheduler.cancel(second, 15.0)
    found = scheduler.statistics(16.0)
    assert found.oldest_wait_seconds is None
    assert found.by_key["agent"][None].ended[Outcome.REJECTED] == 1
    assert found == scheduler.statistics(16.0)


def test_counts_of_idle_keys_are_forgotten_only_beyond_many_and_never_in_all(monkeypatch):
    monkeypatch.setattr("llmq.core.census._KEPT_KEYS", 50)
    scheduler = make(4, Cap(2, by="service_id"))
    for number in range(5000):
        each = job(service_id=str(number))
        scheduler.submit(each, 0.0)
        scheduler.finish(each, Outcome.SUCCEEDED, 0.0)
    scheduler.check()
    assert len(scheduler._registry.lanes) < 2000
    assert len(scheduler._registry.resources) < 2000
    found = scheduler.statistics(0.0)
    assert found.ended[Outcome.SUCCEEDED] == 5000
    assert len(found.by_key["service_id"]) < 2000


def test_what_still_matters_of_an_idle_key_is_not_forgotten(monkeypatch):
    monkeypatch.setattr("llmq.core.registry._KEPT_IDLE", 2)
    scheduler = make(100, Rate(1e6, by="model_name", overrides={"in debt": 60}))
    scheduler.hold("held", 9.0, 0.0)
    scheduler.submit(first := job(model_name="in debt"), 0.0)
    scheduler.finish(first, Outcome.SUCCEEDED, 0.0)
    for number in range(50):
        each = job(model_name=str(number))
        scheduler.submit(each, number / 100)
        scheduler.finish(each, Outcome.SUCCEEDED, number / 100)
    assert len(scheduler._registry.lanes) < 10
    held, second = submit_all(scheduler, [job(model_name="held"), job(model_name="in debt")], 0.5)
    assert (held.state, second.state) == (State.WAITING, State.WAITING)
    assert scheduler.tick(1.1) == [second]
    assert scheduler.tick(9.0) == [held]


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused_with_the_way_out(limit):
    with pytest.raises(ValueError, match=rf"max_concurrency must be at least 1, got {limit}.*pause"):
        make(limit)
    with pytest.raises(ValueError, match="at least 1"):
        make(1).resize(limit, 0.0)


def test_a_job_is_submitted_once():
    scheduler = make(1)
    each = job()
    scheduler.submit(each, 0.0)
    with pytest.raises(ValueError, match="submitted before"):
        scheduler.submit(each, 0.0)
    scheduler.check()


@pytest.mark.parametrize(
    "meta",
    [{"rank": "1"}, {"rank": 1.5}, {"priority": "HIGH"}, {"priority": 9}, {"tokens": -1}, {"tokens": float("inf")}],
)
def test_bad_metadata_is_refused_and_costs_nobody_anything(meta):
    scheduler = make(1)
    with pytest.raises((TypeError, ValueError)):
        scheduler.submit(job(**meta), 0.0)
    scheduler.check()
    assert scheduler.statistics(0.0).submitted == 0


def test_what_was_cancelled_does_not_pile_up():
    scheduler = make(1, Cap(1, by="model_name"))
    submit_all(scheduler, [job(), job(priority=LOW)])
    for number in range(2000):
        each = job(model_name=str(number % 5))
        scheduler.submit(each, 0.0)
        scheduler.cancel(each, 0.0)
        scheduler.check()
    heaps = [[*lane._row, *lane._heap] for lane in scheduler._registry.lanes.values()]
    heaps += [rank.heap for r in [*scheduler._registry.every_resource()] for rank in r.line._ranks.values()]
    heaps += [rank.heap for rank in scheduler._ready._ranks.values()]
    assert sum(map(len, heaps)) < 300


def test_dropping_tells_whom_to_wake():
    scheduler = make(1)
    running, first, second = submit_all(scheduler, [Job(), job("a"), job("b")])
    assert scheduler.drop([first, running], Drop.CANCELLED, 1.0) == [first]
    assert (first.state, first.drop) == (State.ENDED, Drop.CANCELLED)
    assert scheduler.finish(running, Outcome.SUCCEEDED, 2.0) == [second]


def test_draining_refuses_what_is_new_and_nothing_that_was_accepted():
    scheduler = make(1)
    running, waiting = submit_all(scheduler, [Job(), Job()])
    assert scheduler.refuse(Drop.DRAINING, 1.0) == []
    late, retried = Job(), FrontJob()
    submit_all(scheduler, [late, retried])
    assert (late.state, late.drop) == (State.ENDED, Drop.DRAINING)
    assert run_out(scheduler, [running], 2.0) == [retried, waiting]
    scheduler.refuse(None, 3.0)
    scheduler.submit(again := Job(), 3.0)
    assert again.state is State.RUNNING


def test_closing_turns_all_that_wait_away():
    scheduler = make(1)
    running, *waiting = submit_all(scheduler, [Job() for _ in range(3)])
    assert scheduler.refuse(Drop.CLOSED, 1.0) == waiting
    assert running.state is State.RUNNING
    scheduler.submit(late := FrontJob(), 1.0)
    assert late.drop is Drop.CLOSED, "also one that follows a failed attempt: closing is for good"
    scheduler.check()


def test_reconfiguring_keeps_order_and_counts_what_runs_under_the_new_limits():
    scheduler = make(4)
    jobs = submit_all(scheduler, [job(str(n), model_name="m", priority=NORMAL if n % 2 else LOW) for n in range(10)])
    assert scheduler.reconfigure(Policy(4, (Cap(3, by="model_name"),)), 1.0) == []
    scheduler.check()
    assert list(scheduler.finish(jobs[0], Outcome.SUCCEEDED, 1.0)) == [], "three run still"
    assert list(scheduler.finish(jobs[1], Outcome.SUCCEEDED, 1.0)) == [jobs[5]]
    started = scheduler.reconfigure(Policy(20), 2.0)
    assert [each.meta.stage for each in started] == ["7", "9", "4", "6", "8"]
    assert scheduler.statistics(2.0).by_class[LOW].ended[Outcome.SUCCEEDED] == 1


def test_reconfiguring_keeps_holds_and_counts_who_runs_on_the_short_way():
    scheduler = make(4)
    scheduler.submit(running := Job(), 0.0)
    scheduler.hold("a", 10.0, 1.0)
    scheduler.reconfigure(Policy(4, (Cap(1),)), 2.0)
    waiting, held = submit_all(scheduler, [job(model_name="b"), job(model_name="a")], 3.0)
    assert (waiting.state, held.state) == (State.WAITING, State.WAITING)
    assert scheduler.finish(running, Outcome.SUCCEEDED, 4.0) == [waiting]
    assert list(scheduler.finish(waiting, Outcome.SUCCEEDED, 5.0)) == []
    assert scheduler.deadline == 10.0
    assert scheduler.tick(10.0) == [held]


def test_metadata_may_change_after_arrival():
    scheduler = make(2, Cap(1, by="model_name"))
    first, second = submit_all(scheduler, [job(model_name="a"), job(model_name="a")])
    first.meta.model_name = second.meta.model_name = "b"
    assert scheduler.finish(first, Outcome.SUCCEEDED, 1.0) == [second]
    scheduler.check()
