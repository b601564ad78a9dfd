import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from llmq.core import Job, Outcome, Priority, Scheduler, State

LOW, NORMAL, HIGH, URGENT = Priority.LOW, Priority.NORMAL, Priority.HIGH, Priority.URGENT


def test_starts_up_to_the_limit_and_then_queues():
    scheduler = Scheduler(2)
    first, second, third = Job(), Job(), Job()
    assert scheduler.submit(first, 0.0) == [first]
    assert scheduler.submit(second, 0.0) == [second]
    assert scheduler.submit(third, 1.0) == []
    assert scheduler.finish(first, Outcome.SUCCEEDED, 3.0) == [third]
    assert (third.submitted_at, third.started_at) == (1.0, 3.0)
    scheduler.check()


def test_order_is_priority_then_front_then_rank_then_arrival():
    scheduler = Scheduler(1)
    running = Job()
    scheduler.submit(running, 0.0)
    jobs = {
        "low": Job(LOW),
        "late rank": Job(NORMAL, rank=7),
        "early rank": Job(NORMAL, rank=1),
        "same rank, later": Job(NORMAL, rank=1),
        "retried": Job(NORMAL, rank=9, front=True),
        "retried low": Job(LOW, front=True),
        "urgent": Job(URGENT, rank=99),
        "high": Job(HIGH),
    }
    for job in jobs.values():
        scheduler.submit(job, 0.0)
    names = {job: name for name, job in jobs.items()}
    order = []
    while scheduler.running:
        (current,) = scheduler.running
        order += [names[job] for job in scheduler.finish(current, Outcome.SUCCEEDED, 1.0)]
        scheduler.check()
    assert order == [
        "urgent",
        "high",
        "retried",
        "early rank",
        "same rank, later",
        "late rank",
        "retried low",
        "low",
    ]


def test_a_lower_limit_is_reached_as_jobs_end_and_a_higher_one_at_once():
    scheduler = Scheduler(3)
    jobs = [Job() for _ in range(5)]
    for job in jobs:
        scheduler.submit(job, 0.0)
    assert scheduler.reconfigure(0.0, limit=1) == []
    assert scheduler.finish(jobs[0], Outcome.SUCCEEDED, 1.0) == []
    assert scheduler.finish(jobs[1], Outcome.SUCCEEDED, 1.0) == []
    assert scheduler.finish(jobs[2], Outcome.SUCCEEDED, 1.0) == [jobs[3]]
    assert scheduler.reconfigure(2.0, limit=8) == [jobs[4]]


def test_a_pause_starts_nothing_and_its_end_everything_that_fits():
    scheduler = Scheduler(2)
    scheduler.reconfigure(0.0, paused=True)
    jobs = [Job() for _ in range(3)]
    assert [scheduler.submit(job, 0.0) for job in jobs] == [[], [], []]
    assert scheduler.reconfigure(1.0, paused=False) == jobs[:2]


def test_a_hold_keeps_its_key_back_and_no_other():
    scheduler = Scheduler(1)
    running, held, free = Job(key="a"), Job(key="a"), Job(LOW, key="b")
    scheduler.submit(running, 0.0)
    scheduler.submit(held, 0.0)
    scheduler.submit(free, 0.0)
    scheduler.hold("a", 1.0)
    assert scheduler.statistics(1.0).held_keys == ("a",)
    assert scheduler.finish(running, Outcome.REJECTED, 1.0) == [free]
    assert scheduler.finish(free, Outcome.SUCCEEDED, 2.0) == []
    scheduler.hold("a", 2.0)
    assert scheduler.lift("a", 3.0) == [], "two holds need two lifts"
    assert scheduler.lift("a", 3.0) == [held]
    assert scheduler.statistics(3.0).held_keys == ()
    assert scheduler.lift("a", 3.0) == []


def test_ending_twice_counts_once():
    scheduler = Scheduler(1)
    running, waiting = Job(), Job()
    scheduler.submit(running, 0.0)
    scheduler.submit(waiting, 0.0)
    assert scheduler.finish(running, Outcome.SUCCEEDED, 1.0) == [waiting]
    assert scheduler.finish(running, Outcome.REJECTED, 1.0) == []
    assert scheduler.cancel(running, 1.0) == []
    assert scheduler.cancel(waiting, 1.0) == [], "a running job is not cancelled"
    assert waiting.state is State.RUNNING
    assert scheduler.statistics(1.0).ended == {Outcome.SUCCEEDED: 1, Outcome.IGNORED: 0, Outcome.REJECTED: 0}


def test_statistics_add_up_and_name_the_oldest_wait():
    scheduler = Scheduler(1)
    first, second, third = Job(), Job(), Job()
    scheduler.submit(first, 10.0)
    scheduler.submit(second, 11.0)
    scheduler.submit(third, 12.0)
    scheduler.cancel(second, 13.0)
    found = scheduler.statistics(15.0)
    assert (found.limit, found.in_flight, found.waiting, found.submitted, found.abandoned) == (1, 1, 1, 3, 1)
    assert found.oldest_wait_seconds == 3.0
    scheduler.finish(first, Outcome.SUCCEEDED, 15.0)
    assert scheduler.statistics(16.0).oldest_wait_seconds is None


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused_with_the_way_out(limit):
    with pytest.raises(ValueError, match=rf"max_concurrency must be at least 1, got {limit}.*pause"):
        Scheduler(limit)
    with pytest.raises(ValueError, match="at least 1"):
        Scheduler(1).reconfigure(0.0, limit=limit)


def test_a_job_is_submitted_once():
    scheduler = Scheduler(1)
    job = Job()
    scheduler.submit(job, 0.0)
    with pytest.raises(ValueError, match="submitted before"):
        scheduler.submit(job, 0.0)


def test_what_was_cancelled_does_not_pile_up():
    scheduler = Scheduler(1)
    scheduler.submit(Job(), 0.0)
    scheduler.submit(Job(LOW), 0.0)  # stays at the head of arrival order
    for number in range(2000):
        job = Job(key=str(number % 5))
        scheduler.submit(job, 0.0)
        scheduler.cancel(job, 0.0)
        scheduler.check()
    sizes = [len(lane.heap) for lane in scheduler._lanes.values()] + [len(scheduler._ready)]
    assert sum(sizes) < 100


class SchedulerMachine(RuleBasedStateMachine):
    """Random inputs against a slow and simple model: a list, sorted anew each time."""

    waiting = Bundle("waiting")
    jobs = Bundle("jobs")

    @initialize(limit=st.integers(1, 4))
    def start(self, limit):
        self.scheduler = Scheduler(limit)
        self.now = 0.0
        self.expected_waiting = []
        self.expected_running = set()
        self.limit = limit
        self.paused = False
        self.holds = {}

    def settle(self):
        """What the rules say must start now, in order."""
        started = []
        while not self.paused and len(self.expected_running) < self.limit:
            free = [job for job in self.expected_waiting if not self.holds.get(job.key)]
            if not free:
                break
            job = min(free, key=lambda j: (j.priority, not j.front, j.rank, j.sequence))
            self.expected_waiting.remove(job)
            self.expected_running.add(job)
            started.append(job)
        return started

    @rule(
        target=jobs,
        priority=st.sampled_from(Priority),
        rank=st.integers(0, 2),
        key=st.sampled_from([None, "a", "b"]),
        front=st.booleans(),
    )
    def submit(self, priority, rank, key, front):
        job = Job(priority, rank, key, front)
        started = self.scheduler.submit(job, self.now)
        self.expected_waiting.append(job)
        assert started == self.settle()
        return job

    @rule(job=jobs, outcome=st.sampled_from(Outcome))
    def finish(self, job, outcome):
        started = self.scheduler.finish(job, outcome, self.now)
        self.expected_running.discard(job)
        assert started == self.settle()

    @rule(job=consumes(jobs))
    def cancel(self, job):
        if job in self.expected_waiting:
            self.expected_waiting.remove(job)
        assert self.scheduler.cancel(job, self.now) == self.settle()
        if job.state is State.RUNNING:
            self.finish(job, Outcome.IGNORED)

    @rule(limit=st.integers(1, 4))
    def resize(self, limit):
        self.limit = limit
        assert self.scheduler.reconfigure(self.now, limit=limit) == self.settle()

    @rule(paused=st.booleans())
    def pause(self, paused):
        self.paused = paused
        assert self.scheduler.reconfigure(self.now, paused=paused) == self.settle()

    @rule(key=st.sampled_from([None, "a", "b"]))
    def hold(self, key):
        self.holds[key] = self.holds.get(key, 0) + 1
        assert self.scheduler.hold(key, self.now) == self.settle()

    @rule(key=st.sampled_from([None, "a", "b"]))
    def lift(self, key):
        self.holds[key] = max(0, self.holds.get(key, 0) - 1)
        assert self.scheduler.lift(key, self.now) == self.settle()

    @rule(seconds=st.floats(0, 1e6))
    def time_passes(self, seconds):
        self.now += seconds

    @invariant()
    def holds_together(self):
        if hasattr(self, "scheduler"):
            self.scheduler.check()
            assert self.scheduler.running == self.expected_running
            before = self.scheduler.statistics(self.now)
            assert before == self.scheduler.statistics(self.now), "reading changes nothing"
            assert before.waiting == len(self.expected_waiting)


TestSchedulerMachine = SchedulerMachine.TestCase
