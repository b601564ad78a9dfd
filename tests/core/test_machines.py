"""Random inputs: against a slow and simple model where the order is exact, and against the invariants with everything
mixed."""

import math

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

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
from llmq.core.rates import _SHY, Bucket

MODELS = st.sampled_from([None, "a", "b"])
AGENTS = st.sampled_from([{}, {"agent": "x"}, {"agent": "y"}])


class ExactMachine(RuleBasedStateMachine):
    """Slots, caps by key, rates of requests, holds, classes, fronts, ranks: each start as the rules say, in order."""

    jobs = Bundle("jobs")

    @initialize(
        limit=st.integers(1, 4),
        caps=st.sets(st.sampled_from(["model_name", "agent", None])),
        cap=st.integers(1, 2),
        per_second=st.sampled_from([None, 0.5, 2]),
        burst=st.sampled_from([0, 2]),
    )
    def start(self, limit, caps, cap, per_second, burst):
        limits = [Cap(cap, by=by) for by in sorted(caps, key=str)]
        self.rate = None
        if per_second is not None:
            self.rate = Rate(per_second, per="second", by="model_name", burst=burst)
            limits.append(self.rate)
            self.per_second = per_second * _SHY
        self.scheduler = Scheduler(Policy(limit, tuple(limits), ageing_seconds=None))
        self.caps = [(each.by, each.limit) for each in limits if isinstance(each, Cap)]
        self.limit = limit
        self.now = 0.0
        self.paused = False
        self.waiting = []
        self.running = set()
        self.holds = {}
        self.spreads = {}
        self.buckets = {}

    def may_start(self, job):
        if self.now < self.holds.get(job.meta.model_name, 0):
            return False
        for by, limit in self.caps:
            key = by and job.meta.value_of(by)
            if sum((by and each.meta.value_of(by)) == key for each in self.running) >= limit:
                return False
        if self.rate is None:
            return True
        at, level = self.buckets.get(job.meta.model_name, (0.0, self.rate.burst))
        return at + (min(1, self.rate.burst) - level) / self.per_second <= self.now

    def settle(self):
        """What the rules say must start now, in order."""
        started = []
        while not self.paused and len(self.running) < self.limit:
            free = [job for job in self.waiting if self.may_start(job)]
            if not free:
                break
            job = min(free, key=lambda j: (j.meta.priority, not j.front, j.meta.rank, j.sequence))
            self.waiting.remove(job)
            self.running.add(job)
            started.append(job)
            wide_open_at, gap = self.spreads.get(job.meta.model_name, (0, 0))
            if self.now < wide_open_at:
                self.holds[job.meta.model_name] = self.now + gap
            if self.rate is not None:
                at, level = self.buckets.get(job.meta.model_name, (0.0, self.rate.burst))
                level = min(self.rate.burst, level + (self.now - at) * self.per_second)
                self.buckets[job.meta.model_name] = (self.now, level - 1)
        return started

    @rule(
        target=jobs,
        priority=st.sampled_from(Priority),
        rank=st.integers(0, 2),
        model=MODELS,
        labels=AGENTS,
        front=st.booleans(),
        plain=st.booleans(),
    )
    def submit(self, priority, rank, model, labels, front, plain):
        meta = LLMTaskMeta(model_name=model, priority=priority, rank=rank, labels=labels)
        job = Job() if plain else (FrontJob if front else Job)(meta)
        woken = self.scheduler.submit(job, self.now)
        self.waiting.append(job)
        expected = self.settle()
        assert (job.state is State.RUNNING) == (job in expected)
        assert list(woken) == [other for other in expected if other is not job]
        return job

    @rule(job=jobs, outcome=st.sampled_from(Outcome))
    def finish(self, job, outcome):
        job.used_tokens = None
        started = self.scheduler.finish(job, outcome, self.now)
        self.running.discard(job)
        assert list(started or ()) == self.settle()

    @rule(job=consumes(jobs))
    def cancel(self, job):
        if job in self.waiting:
            self.waiting.remove(job)
            assert list(self.scheduler.cancel(job, self.now)) == self.settle()

    @rule(limit=st.integers(1, 4))
    def resize(self, limit):
        self.limit = limit
        assert self.scheduler.resize(limit, self.now) == self.settle()

    @rule(paused=st.booleans())
    def pause(self, paused):
        self.paused = paused
        assert self.scheduler.pause(paused, self.now) == self.settle()

    @rule(model=MODELS, seconds=st.sampled_from([0.25, 3.0]), spread=st.sampled_from([0, 1.0]))
    def hold(self, model, seconds, spread):
        self.holds[model] = max(self.holds.get(model, 0), self.now + seconds)
        self.spreads[model] = (self.holds[model] + spread, spread / self.limit)
        assert self.scheduler.hold(model, self.now + seconds, self.now, spread_seconds=spread) == self.settle()

    @rule(seconds=st.sampled_from([0.25, 1.0, 10.0]))
    def time_passes(self, seconds):
        """By every deadline on the way: an exact timer is never late."""
        end = self.now + seconds
        while (deadline := self.scheduler.deadline) is not None and deadline <= end:
            self.now = max(self.now, deadline)
            woken = self.scheduler.tick(self.now)
            assert woken == self.settle()
            after = self.scheduler.deadline
            assert woken or after is None or after > deadline or len(self.running) >= self.limit or self.paused
        self.now = end
        assert self.scheduler.tick(end) == self.settle()

    @invariant()
    def holds_together(self):
        if hasattr(self, "scheduler"):
            self.scheduler.check()
            assert self.scheduler.in_flight == len(self.running)
            assert set(self.scheduler.jobs()) == set(self.waiting)


CAPS = st.lists(
    st.builds(Cap, st.integers(1, 3), st.sampled_from([None, "model_name", "agent"])),
    max_size=2,
    unique_by=lambda cap: cap.by,
)
RATES = st.lists(
    st.builds(
        Rate,
        st.sampled_from([1, 5, 60]),
        st.sampled_from(["second", "minute"]),
        st.sampled_from(["requests", "tokens"]),
        st.sampled_from([None, "model_name", "agent"]),
        st.sampled_from([0, 3, 20]),
    ),
    max_size=3,
    unique_by=lambda rate: (rate.by, rate.of, rate.per),
)
DEPTHS = st.lists(
    st.builds(Depth, st.integers(0, 4), st.sampled_from([None, "agent"])), max_size=2, unique_by=lambda depth: depth.by
)
POLICIES = st.builds(
    lambda limit, caps, rates, depths, overflow, ageing, strict, share: Policy(
        limit, (*caps, *rates, *depths), overflow, ageing, frozenset(strict), share
    ),
    st.integers(1, 5),
    CAPS,
    RATES,
    DEPTHS,
    st.sampled_from(["wait", "reject", "drop_oldest"]),
    st.sampled_from([None, 0, 2.0]),
    st.sets(st.sampled_from(Priority), max_size=1),
    st.sampled_from([None, FairShare("agent", weights={"x": 3}), FairShare("model_name", of="tokens")]),
)


class MixedMachine(RuleBasedStateMachine):
    """Everything at once, with clocks that jump: nothing is lost or doubled, no cap or rate exceeded, nobody waits for
    nothing, and in the end all get their turn."""

    jobs = Bundle("jobs")

    @initialize(policy=POLICIES)
    def start(self, policy):
        self.scheduler = Scheduler(policy)
        self.now = 1000.0
        self.known = []
        self.told = set()
        self.given_back = False

    def note(self, woken):
        for job in woken or ():
            assert job not in self.told, "woken twice"
            assert job.state is State.RUNNING or job.drop is not None
            self.told.add(job)

    @rule(
        target=jobs,
        priority=st.sampled_from(Priority),
        rank=st.integers(0, 2),
        model=MODELS,
        labels=AGENTS,
        tokens=st.sampled_from([None, 0, 1, 4, 50]),
        front=st.booleans(),
        plain=st.booleans(),
    )
    def submit(self, priority, rank, model, labels, tokens, front, plain):
        meta = LLMTaskMeta(model_name=model, priority=priority, rank=rank, labels=labels, tokens=tokens)
        job = Job() if plain else (FrontJob if front else Job)(meta)
        woken = self.scheduler.submit(job, self.now)
        assert job not in woken
        if job.state is not State.WAITING:
            self.told.add(job)
        self.note(woken)
        self.known.append(job)
        return job

    @rule(job=jobs, outcome=st.sampled_from(Outcome), used=st.sampled_from([None, 0, 3, 90]))
    def finish(self, job, outcome, used):
        job.used_tokens = used
        running = job.state is State.RUNNING
        woken = self.scheduler.finish(job, outcome, self.now)
        assert (woken is None) == (not running)
        self.note(woken)

    @rule(job=consumes(jobs))
    def cancel(self, job):
        self.note(self.scheduler.cancel(job, self.now))
        assert job.state is State.ENDED

    @rule(job=jobs)
    def drop(self, job):
        self.note(self.scheduler.drop([job], Drop.CANCELLED, self.now))

    @rule(limit=st.integers(1, 5))
    def resize(self, limit):
        self.note(self.scheduler.resize(limit, self.now))

    @rule(policy=POLICIES)
    def reconfigure(self, policy):
        waiting = set(self.scheduler.jobs())
        self.note(self.scheduler.reconfigure(policy, self.now))
        assert all(job.drop is None for job in waiting), "nobody is turned away by it"

    @rule(paused=st.booleans())
    def pause(self, paused):
        self.note(self.scheduler.pause(paused, self.now))

    @rule(why=st.sampled_from([None, None, Drop.DRAINING]))
    def refuse(self, why):
        self.note(self.scheduler.refuse(why, self.now))

    @rule(model=MODELS, seconds=st.floats(0, 20), spread=st.floats(0, 2))
    def hold(self, model, seconds, spread):
        self.note(self.scheduler.hold(model, self.now + seconds, self.now, spread_seconds=spread))

    @rule(seconds=st.floats(0, 100))
    def time_passes(self, seconds):
        self.now += seconds
        self.note(self.scheduler.tick(self.now))

    @rule()
    def to_the_deadline(self):
        deadline = self.scheduler.deadline
        if deadline is not None:
            self.now = max(self.now, deadline)
            self.note(self.scheduler.tick(self.now))
            after = self.scheduler.deadline
            assert after is None or after > deadline, "after its tick a deadline has passed"

    @rule(seconds=st.sampled_from([1e-7, 0.5, 1e3, 1e6]))
    def the_clock_goes_back(self, seconds):
        self.now -= seconds
        self.note(self.scheduler.tick(self.now))

    @invariant()
    def holds_together(self):
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check()
        before = self.scheduler.statistics(self.now)
        for job in self.known[-3:]:
            assert self.scheduler.explain(job, self.now)
        assert before == self.scheduler.statistics(self.now), "reading changes nothing"
        ended = sum(before.ended.values()) + sum(before.dropped.values()) + before.abandoned
        assert before.submitted == before.waiting + before.at_door + before.in_flight + ended == len(self.known)
        by_class = before.by_class.values()
        assert sum(counts.waiting for counts in by_class) == before.waiting + before.at_door
        assert sum(counts.in_flight for counts in by_class) == before.in_flight
        for resource in self.scheduler._registry.every_resource():
            if isinstance(resource, Bucket):
                assert resource.level <= resource.burst + 0.25 * resource.per_second + 1e-6

    def teardown(self):
        """All that wait get their turn."""
        if not hasattr(self, "scheduler"):
            return
        self.refuse(None)
        self.pause(False)
        for _ in range(10 * len(self.known) + 10):
            for job in self.known:
                if job.state is State.RUNNING:
                    job.used_tokens = None
                    self.note(self.scheduler.finish(job, Outcome.SUCCEEDED, self.now))
            if self.scheduler.deadline is not None:
                self.now = max(self.now, self.scheduler.deadline)
                self.note(self.scheduler.tick(self.now))
        assert all(job.state is State.ENDED for job in self.known), "somebody never got a turn"
        assert math.isfinite(self.now)
        self.scheduler.check()


TestExactMachine = ExactMachine.TestCase
TestExactMachine.settings = settings(max_examples=150, stateful_step_count=50, phases=[Phase.reuse, Phase.generate])
TestMixedMachine = MixedMachine.TestCase
TestMixedMachine.settings = settings(max_examples=200, stateful_step_count=50, phases=[Phase.reuse, Phase.generate])
