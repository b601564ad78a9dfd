"""Which call starts next, as a state machine of plain functions.

Rules
- A job runs when a slot is free, the scheduler is not paused, and every resource of its lane lets it: its model's gate,
  the caps and the rates (`lanes.py` says how jobs wait, and who goes first).
- Every input returns the jobs whose callers must be woken, in order: they run now, or have a `drop`. The job that is
  submitted is never among them; its state tells. A running job holds what it took until `finish` or, if it never
  began its call, `cancel`; whoever calls them, a second time does nothing.
- Whoever waits, waits for something named: a running job, a moment in time, a pause. `deadline` is the next such
  moment; `tick` at it, or later, starts what it lets start. A spurious tick is harmless.
- The depth of the queue bounds who may wait. Full, it refuses, or drops the oldest of the lowest class, or lets callers
  wait at the door. Those at the door are not accepted yet, so `drain` turns them away; else they are treated as all.
- A clock that goes back is taken for another clock: no wait gets longer by it.

How a settling goes: the best lane that stands ready is asked what blocks its head. If nothing does, it starts; else
the lane goes to stand in the blocker's line. A resource that has something to give offers it to the best lane in its
line, one at a time, by letting it stand ready again; what can only be given later, sets an alarm. So a job costs
O(log n) for each resource that it passes, and nobody looks through others' waiters. (Lanes between two resources that
are exhausted in turn do go to and fro: then a start can cost a step for each lane, never for each job.)

The short way: where nothing but slots is asked for and nobody waits, free slots are lent out as `passes`. Whoever pops
one may run a call that tells nothing, with no lock held, and appends it again in the end; both are atomic. Then, but
not before, it must look whether passes are wanted back: somebody is `waiting`, or it is `closed`; if so, `recall` is
due. The scheduler first counts a waiter and then looks for passes. So one of both sees the other.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from heapq import heapify, heappop, heappush

from llmq.core.capacity import Places, Seats
from llmq.core.census import Census
from llmq.core.jobs import NO_META, Counts, Drop, Job, Outcome, Pass, Priority, State, Statistics
from llmq.core.lanes import CLOCK_JUMP_SECONDS, Claim, Lane, Resource
from llmq.core.policy import Policy, identity
from llmq.core.rates import Bucket, Rate
from llmq.core.registry import Registry

_NOBODY: Sequence[Job] = ()
_MOST_LENT = 1024
_SLACK = 64
_RUNNING, _ENDED = State.RUNNING, State.ENDED
_SUCCEEDED = Outcome.SUCCEEDED


class Scheduler:
    """Slots, caps, rates and order. Not thread-safe; every method takes the time where it needs it."""

    def __init__(self, policy: Policy) -> None:
        self.paused = False
        self.refusing: Drop | None = None
        self.waiting = 0
        self._claims: dict[int, Claim] = {}  # of those who run, apart from those that tell nothing
        self._free = policy.max_concurrency  # neither taken nor lent
        self._plain_successes = 0
        self.passes: deque[Pass] = deque()
        self.closed = False
        self.numbers = itertools.count(1)
        self._lent = 0
        self._all_passes: list[Pass] = []
        self._idle_passes: list[Pass] = []
        self._submitted = 0
        self._abandoned = 0
        self._dropped = dict.fromkeys(Drop, 0)
        self._census = Census()
        self._now = -math.inf
        self._plain = Claim(None, NO_META)  # type: ignore[arg-type]  # shared by all on the short way
        self._adopt(policy, Registry(policy, self._census, {}))
        self._registry.settle_in()

    def _adopt(self, policy: Policy, registry: Registry) -> None:
        self.policy = policy
        self.limit = policy.max_concurrency
        self._registry = registry
        self._has_rates = any(isinstance(limit, Rate) for limit in policy.limits)
        self._has_depths = bool(policy.depths)
        self._bare = not policy.limits and policy.fair_share is None
        self.counts_tokens = any(isinstance(limit, Rate) and limit.of == "tokens" for limit in policy.limits) or (
            policy.fair_share is not None and policy.fair_share.of == "tokens"
        )
        self._ready = self._registry.line()
        self._at_door: dict[int, Places] = {}
        self._virtual_times: dict[int, float] = {}
        self.alarms: list[tuple[float, int, Resource]] = []
        self._alarm_number = 0
        self._plain.lane = self._registry.lane(NO_META, self._now)
        self._plain.lane.is_plain = True
        self._open = self._bare
        self._short = self._bare and not self.paused and self.refusing is None
        self.closed = not self._short or self._free < 0

    @property
    def in_flight(self) -> int:
        """How many jobs run."""
        return self.limit - self._free - len(self.passes)

    @property
    def uses_time(self) -> bool:
        """Whether there may be a deadline: rates, or a gate that has kept somebody back."""
        return self._has_rates or not all(gate.is_through(self._now) for gate in self._registry.gates.values())

    @property
    def deadline(self) -> float | None:
        """The next moment at which `tick` would do something, or None."""
        while self.alarms and self.alarms[0][2].alarm != self.alarms[0][0]:
            heappop(self.alarms)
        return self.alarms[0][0] if self.alarms else None

    def submit(self, job: Job, now: float) -> Sequence[Job]:
        """Take in a new job. Afterwards it runs, waits, or has a `drop`."""
        job.sequence = next(self.numbers)
        self._submitted += 1
        job.submitted_at = now
        if self._short and job.meta is NO_META and (self._free > 0 or self._take_back(1)):
            job.state = _RUNNING
            job.started_at = now
            job.claim = self._plain
            self._free -= 1
            return _NOBODY
        return self._take_in(job, now)

    def finish(self, job: Job, outcome: Outcome, now: float) -> Sequence[Job] | None:
        """End a running job, giving on what it took. None: it does not run, and is left alone."""
        if job.state is not _RUNNING or (job.lease is not None and not self._turn_in(job)):
            return None
        job.state = _ENDED
        self._free += 1
        if outcome is _SUCCEEDED and job.claim is self._plain and self._bare:
            self._plain_successes += 1
        else:
            self._end(job, outcome, now)
        return self._settle(now) if self.waiting else _NOBODY

    def cancel(self, job: Job, now: float) -> Sequence[Job]:
        """Take a job out that waits, or that was to run and never began: that gives all back that it took."""
        if job.state is State.WAITING:
            self._take_out(job, now)
            self._abandoned += 1
        elif job.state is _RUNNING and (job.lease is None or self._turn_in(job)):
            job.state = _ENDED
            self._free += 1
            self._give_back(job, now, used=None, refund=True)
            self._abandoned += 1
        return self._settle(now)

    def drop(self, jobs: Sequence[Job], why: Drop, now: float) -> Sequence[Job]:
        """Turn jobs away that wait; their callers must be told."""
        dropped = [job for job in jobs if self._drop(job, why, now)]
        return [*dropped, *self._settle(now)]

    def lend(self) -> None:
        """Lend what is free to the short way, if it is open."""
        self.closed = not self._short or self._free < 0
        while not self.closed and not self.waiting and self._free > 0 and self._lent < _MOST_LENT:
            if not self._idle_passes:
                self._idle_passes.append(Pass())
                self._all_passes.append(self._idle_passes[-1])
            self._free -= 1
            self._lent += 1
            self.passes.append(self._idle_passes.pop())

    def recall(self, now: float) -> Sequence[Job]:
        """Take back the passes that were appended, where they are wanted."""
        return self._settle(now)

    def tick(self, now: float) -> Sequence[Job]:
        """Start what `deadline` was waited for."""
        return self._settle(now)

    def hold(self, model_name: str | None, until: float, now: float, *, spread_seconds: float = 0.0) -> Sequence[Job]:
        """Keep the waiting jobs of a model from starting until a time; then let a full set of slots start over
        `spread_seconds`."""
        self._now = max(now, self._now)
        self._registry.gate(model_name).hold(until, now, spread_seconds, self.limit)
        self._look_for_short_way(now)
        return self._settle(now)

    def let_back(self, model_name: str | None, until: float, now: float) -> None:
        """The job for whose sake a model was held until then comes back: who is submitted next goes first."""
        gate = self._registry.gates.get(model_name)
        if gate is not None:
            gate.let_back(until, now)

    def pause(self, paused: bool, now: float) -> Sequence[Job]:
        """Start nothing more, or go on."""
        self.paused = paused
        self._look_for_short_way(now)
        return self._settle(now)

    def refuse(self, why: Drop | None, now: float) -> Sequence[Job]:
        """Take in no new jobs, or do again. Those at the door are turned away, and with CLOSED all that wait."""
        self.refusing = why
        self._look_for_short_way(now)
        if why is None:
            return self._settle(now)
        jobs = (
            list(self.jobs()) if why is Drop.CLOSED else [job for job in self.jobs() if job.sequence in self._at_door]
        )
        return self.drop(jobs, why, now)

    def resize(self, max_concurrency: int, now: float) -> Sequence[Job]:
        """Change the number of slots. Running jobs keep theirs, so a lower one is reached as they end."""
        self.policy = replace(self.policy, max_concurrency=max_concurrency)
        self._take_back()
        self._free += max_concurrency - self.limit
        self.limit = max_concurrency
        self._look_for_short_way(now)
        return self._settle(now)

    def reconfigure(self, policy: Policy, now: float) -> Sequence[Job]:
        """Go on under another policy: who waits keeps its place in the order, who runs counts under the new limits,
        and what a rate has given out stays given out. Nobody who waits is turned away. Costs O(waiting).

        Metadata is read again. Raises TypeError if it cannot be a key of a new limit; then nothing has changed.
        """
        old = self._registry
        self._take_back()
        for bucket in old.buckets().values():
            bucket.advance(now)
        registry = Registry(policy, self._census, old.buckets_to_carry_over(now))
        same_rates = self._token_rates(policy) == self._token_rates(self.policy)
        running = {sequence: _again(registry, claim, now) for sequence, claim in self._claims.items()}
        waiting = sorted(self.jobs(), key=lambda job: job.sequence)
        claims = [_again(registry, job.claim, now) for job in waiting]
        for lane in old.lanes.values():
            self._census.remember(lane, old.keys)
        plain = self.limit - self._free - len(self._claims)  # with every pass that is out: each is taken back once
        self._free += policy.max_concurrency - self.limit
        self._adopt(policy, registry)
        for model_name, gate in old.gates.items():
            if not gate.idle(now):
                registry.gate(model_name).follow(gate)
        self._claims = running
        for claim in running.values():
            claim.reserved = claim.reserved if same_rates else None
            claim.lane.in_flight += 1
            for resource in claim.lane.resources:
                resource.count_running(1)
        for resource in self._plain.lane.resources:
            resource.count_running(plain)
        self.waiting = 0
        for job, claim in zip(waiting, claims, strict=True):
            job.claim = claim
            self._wait(job)
            self._find_place(job)
        registry.settle_in()
        self._look_for_short_way(now)
        return self._settle(now)

    @staticmethod
    def _token_rates(policy: Policy) -> set[object]:
        return {identity(limit) for limit in policy.limits if isinstance(limit, Rate) and limit.of == "tokens"}

    def model_of(self, job: Job) -> str | None:
        """The model that a job asked for when it came."""
        return None if job.meta is NO_META else job.claim.lane.values[0]

    def runs(self, request_id: str) -> bool:
        """Whether a call with that id runs."""
        return any(claim.meta.request_id == request_id for claim in self._claims.values())

    def jobs(self) -> Iterator[Job]:
        """All that wait."""
        for lane in self._registry.lanes.values():
            yield from lane.waiting.values()

    def explain(self, job: Job, now: float, *, count: bool = True) -> str:
        """What a job waits for, in words; with `count` in O(waiting), since that tells how many go before it."""
        if job.state is _RUNNING:
            return f"runs, for {now - (job.started_at or now):.1f} s"
        if job.state is not State.WAITING:
            return "has ended" if job.started_at is not None or job.drop is None else f"was dropped: {job.drop.value}"
        lane = job.claim.lane
        door = self._at_door.get(job.sequence)
        before = lane.before(job) if count else 0
        behind = f", with {before} like it before it" if before else ""
        if door is not None:
            behind += f", at the door of a full queue ({door.describe()})"
        tokens = self._tokens(lane)
        for resource in lane.resources:
            if resource.ready_at(tokens, now) > now:
                return f"waits for {resource.why(tokens, now)}{behind}"
        if self.paused:
            return f"waits for resume(): the queue is paused{behind}"
        if self._free <= 0:
            return f"waits for one of {self.limit} slots, all taken{behind}"
        for resource in lane.resources:
            if lane.line is resource.line:
                return f"waits behind others for {resource.why(tokens, now)}{behind}"
        return f"is about to start{behind}"

    def describe_depth(self, job: Job) -> str:
        """The bounds on waiting that are reached for a job's like, in words."""
        return ", ".join(places.describe() for places in self._registry.places_of(job) if places.full)

    def waiting_by_class(self) -> dict[Priority, int]:
        """How many wait, in O(lanes)."""
        found = dict.fromkeys(Priority, 0)
        for lane in self._registry.lanes.values():
            found[Priority(lane.priority)] += len(lane.waiting)
        return found

    def statistics(self, now: float) -> Statistics:
        """What is counted, in O(keys). Changes nothing."""
        in_flight = self.in_flight
        by_pass = self._lent - len(self.passes), sum(each.uses for each in self._all_passes)
        plain = Counts(in_flight=in_flight - len(self._claims))
        plain.ended[_SUCCEEDED] = self._plain_successes + by_pass[1]
        by_class, by_key = self._census.tell(self._registry.lanes.values(), plain, self._registry.keys, now)
        waits = [c.oldest_wait_seconds for c in by_class.values() if c.oldest_wait_seconds is not None]
        return Statistics(
            limit=self.limit,
            paused=self.paused,
            in_flight=in_flight,
            waiting=self.waiting - len(self._at_door),
            at_door=len(self._at_door),
            submitted=self._submitted + sum(by_pass),
            abandoned=self._abandoned,
            dropped=dict(self._dropped),
            ended={outcome: sum(counts.ended[outcome] for counts in by_class.values()) for outcome in Outcome},
            oldest_wait_seconds=max(waits, default=None),
            held_keys=tuple(key for key, gate in self._registry.gates.items() if gate.ready_at(0.0, now) > now),
            by_class=by_class,
            by_key=by_key,
        )

    def check(self) -> None:
        """Raise AssertionError if an invariant does not hold. For tests, after every step."""
        lanes = list(self._registry.lanes.values())
        gone = self._abandoned + sum(self._dropped.values()) + self._census.ended(lanes) + self._plain_successes
        by_pass = self._lent - len(self.passes)
        assert self._submitted == self.waiting + self.in_flight - by_pass + gone, "a job was lost or doubled"
        assert len(self._all_passes) == self._lent + len(self._idle_passes)
        assert self.closed or (self._short and self._free >= 0)
        assert not self._open or not any(gate.line for gate in self._registry.gates.values()), "a gate is passed by"
        assert not self.passes or not (self.waiting or self.closed), "passes are wanted back, and nobody recalls them"
        plain = self.in_flight - len(self._claims)
        assert plain >= by_pass >= 0
        assert self.waiting == sum(len(lane.waiting) for lane in lanes)
        in_flight: dict[Lane, int] = {}
        for claim in self._claims.values():
            in_flight[claim.lane] = in_flight.get(claim.lane, 0) + 1
        for lane in lanes:
            self._check_lane(lane, in_flight.get(lane, 0))
        for resource in self._registry.every_resource():
            if isinstance(resource, Seats):
                sitting = sum(n for lane, n in in_flight.items() if resource in lane.resources)
                sitting += plain * (resource in self._plain.lane.resources)
                assert resource.taken == sitting, "a seat was lost or doubled"
            resource.line.check()
        self._ready.check()
        for places in self._registry.places.values():
            inside = [job for jobs in places.inside.values() for job in jobs.values()]
            assert places.taken == len(inside)
            assert all(job.state is State.WAITING and job.sequence not in self._at_door for job in inside)
        assert all(place.full for place in self._at_door.values()), "somebody stands at an open door"
        if not self.paused and self._free > 0:
            assert not self._ready, "a slot is free, and a lane stands ready"
        for resource in self._registry.every_resource():
            self._check_resource(resource)

    def _check_lane(self, lane: Lane, in_flight: int) -> None:
        assert lane.in_flight == in_flight
        lane.check()
        if not lane.waiting:
            assert lane.line is None
            return
        assert lane.line is not None, "a lane waits for nothing"
        assert lane.entry is not None
        assert lane.entry[3] == lane.head.sequence, "a lane stands by an old head"
        assert lane.line is self._ready or lane.line in [resource.line for resource in lane.resources]

    def _check_resource(self, resource: Resource) -> None:
        if resource.offered is not None:
            assert resource.offered.line is self._ready
            assert resource.offered.offered_by is resource
        elif (lane := resource.line.best(self._now)) is not None:
            # With an alarm set, ageing or a new estimate may have made somebody else the best meanwhile.
            at = resource.ready_at(self._tokens(lane), self._now)
            assert at > self._now or resource.alarm is not None, "a resource keeps what it has"
            assert at == math.inf or resource.alarm is not None, "no alarm is set"

    def _take_in(self, job: Job, now: float) -> Sequence[Job]:
        """`submit`, the long way."""
        if job.state is not State.NEW:
            self._submitted -= 1
            raise ValueError(f"job {job.sequence} was submitted before; a job is one attempt, make a new one")
        job.drop = job.started_at = job.used_tokens = None
        if self._bare and job.meta is NO_META:
            job.claim = self._plain
        else:
            try:
                job.claim = self._registry.claim(job.meta, now)
            except BaseException:
                self._submitted -= 1
                raise
        why = self.refusing
        if why is not None and (why is Drop.CLOSED or not job.front):
            self._turned_away(job, why)
            return _NOBODY
        self._wait(job)
        if self._open and self._free <= 0 and not self.passes:
            return _NOBODY
        woken = [other for other in self._settle(now) if other is not job]
        if self._has_depths and not job.front and job.sequence in job.claim.lane.waiting:
            woken += [other for other in self._make_room(job, now) if other is not job]
            self._find_place(job)
        return woken

    def _wait(self, job: Job) -> None:
        job.state = State.WAITING
        self.waiting += 1
        if job.claim.lane.add(job):
            self._stand_ready(job.claim.lane)

    def _make_room(self, job: Job, now: float) -> Sequence[Job]:
        """Where the queue is full: turn the newcomer away, or others for it, or nobody. Returns whom else to wake."""
        full = [places for places in self._registry.places_of(job) if places.full]
        if not full or self.policy.overflow == "wait":
            return _NOBODY
        victims = [places.oldest_of_lowest_class() for places in full]
        if self.policy.overflow == "reject" or any(
            victim is None or victim.claim.lane.priority < job.claim.lane.priority for victim in victims
        ):
            self._drop(job, Drop.FULL, now)
            return self._settle(now)
        woken = list[Job]()
        for places in sorted(full, key=lambda places: places.by is None):  # the narrower first: it may do for both
            victim = places.oldest_of_lowest_class()
            if places.full and victim is not None and self._drop(victim, Drop.OLDEST, now):
                woken.append(victim)
        return [*woken, *self._settle(now)]

    def _find_place(self, job: Job) -> None:
        """Let a waiting job in, or let it stand at the first door that is closed to it."""
        if job.state is not State.WAITING or not self._has_depths or job.front:
            return
        places = self._registry.places_of(job)
        closed = next((place for place in places if place.full), None)
        if closed is None:
            for place in places:
                place.enter(job)
        else:
            self._at_door[job.sequence] = closed
            heappush(closed.door, (job.sequence, job))
            if len(closed.door) > 2 * len(self._at_door) + _SLACK:
                closed.door = [entry for entry in closed.door if self._at_door.get(entry[0]) is closed]
                heapify(closed.door)

    def _leave_place(self, job: Job) -> None:
        """Give a job's place up, and let in who stands at the door for it."""
        if not self._has_depths or self._at_door.pop(job.sequence, None) is not None:
            return
        for place in self._registry.places_of(job):
            place.leave(job)
            while place.door and not place.full:
                sequence, other = heappop(place.door)
                if self._at_door.get(sequence) is place:
                    del self._at_door[sequence]
                    self._find_place(other)

    def _take_out(self, job: Job, now: float) -> None:
        """Let a waiting job leave."""
        job.state = _ENDED
        self.waiting -= 1
        lane = job.claim.lane
        was_head = lane.remove(job)
        self._leave_place(job)
        if not was_head:
            return
        if lane.waiting:
            self._stand_ready(lane)
        else:
            self._stand_down(lane)
        for resource in lane.resources:
            self._offer(resource, now)

    def _drop(self, job: Job, why: Drop, now: float) -> bool:
        if job.state is not State.WAITING:
            return False
        self._take_out(job, now)
        self._turned_away(job, why)
        return True

    def _turned_away(self, job: Job, why: Drop) -> None:
        job.state = _ENDED
        job.drop = why
        self._dropped[why] += 1

    def _settle(self, now: float) -> list[Job]:
        """Start what can start. The one place where waiting jobs become running ones."""
        if self.passes and (self.waiting or self.closed):
            self._take_back()
        self.closed = not self._short or self._free < 0
        if self._open:
            return self._start_freely(now)
        now = self._ring(now)
        started: list[Job] = []
        while not self.paused and self._free > 0 and (job := self._next(now)) is not None:
            job.state = _RUNNING
            job.started_at = now
            self._free -= 1
            self.waiting -= 1
            self._leave_place(job)
            started.append(job)
        return started

    def _start_freely(self, now: float) -> list[Job]:
        """`_settle` where nothing but slots is asked for."""
        started: list[Job] = []
        ready = self._ready
        while self._free > 0 and not self.paused and (lane := ready.best(now)) is not None:
            job = lane.pop()
            job.state = _RUNNING
            job.started_at = now
            if job.claim is not self._plain:
                self._claims[job.sequence] = job.claim
                lane.in_flight += 1
            self._free -= 1
            self.waiting -= 1
            started.append(job)
            ready.served(lane.priority, now)
            if lane.waiting:
                ready.renew(lane)
            else:
                ready.remove(lane)
        return started

    def _ring(self, now: float) -> float:
        """Let the resources whose alarm is due offer what they have. Returns the time to go by."""
        if now < self._now - CLOCK_JUMP_SECONDS:
            for resource in self._registry.every_resource():
                resource.clock_went_back(now)
                self._offer(resource, now)
        elif now < self._now:
            now = self._now
        self._now = now
        while (deadline := self.deadline) is not None and deadline <= now:
            resource = heappop(self.alarms)[2]
            resource.alarm = None
            if now > deadline:
                resource.was_late(now - deadline, now)
            self._offer(resource, now)
        if self._bare:
            self._look_for_short_way(now)
        return now

    def _next(self, now: float) -> Job | None:
        """Take the job that may start, and what it needs; None if there is none."""
        while (lane := self._ready.best(now)) is not None:
            source = self._stand_down(lane)
            tokens = self._tokens(lane)
            blocker = _blocker(lane, tokens, source, now)
            if blocker is not None:
                blocker.line.add(lane)
                self._offer(blocker, now)
                if source is not None:
                    self._offer(source, now)
                continue
            job = lane.pop()
            job.claim.reserved = tokens
            if job.claim is not self._plain:
                self._claims[job.sequence] = job.claim
                lane.in_flight += 1
            self._charge(lane, tokens)
            self._ready.served(lane.priority, now)
            for resource in lane.resources:
                resource.take(tokens, now)
                resource.line.served(lane.priority, now)
            if lane.waiting:
                self._stand_ready(lane)
            for resource in lane.resources:
                self._offer(resource, now)
            return job
        return None

    def _offer(self, resource: Resource, now: float) -> None:
        """Let the best lane that waits for a resource try again, if the resource has something for it."""
        if resource.offered is not None:
            return
        if (lane := resource.line.best(now)) is None:
            resource.alarm = None
            return
        at = resource.ready_at(self._tokens(lane), now)
        if at <= now:
            self._stand_ready(lane)
            resource.offered = lane
            lane.offered_by = resource
        elif at < math.inf and resource.alarm != at:
            resource.alarm = at
            self._alarm_number += 1
            heappush(self.alarms, (at, self._alarm_number, resource))
            if len(self.alarms) > 2 * len(self._registry.resources) + _SLACK:
                self.alarms = [entry for entry in self.alarms if entry[2].alarm == entry[0]]
                heapify(self.alarms)

    def _stand_ready(self, lane: Lane) -> None:
        """Let a lane that has jobs stand among the ready ones, by its present head; what it was offered stays so."""
        if lane.line is not None:
            lane.line.remove(lane)
        if lane.flow is not None:
            lane.tag = max(self._virtual_times.get(lane.priority, 0.0), lane.flow.finish)
            lane.flow.correction = 0.0
        self._ready.add(lane)

    def _stand_down(self, lane: Lane) -> Resource | None:
        """Let a lane leave its line. Returns the resource that had offered it something."""
        if lane.line is not None:
            lane.line.remove(lane)
        source, lane.offered_by = lane.offered_by, None
        if source is not None:
            source.offered = None
        return source

    def _charge(self, lane: Lane, tokens: float) -> None:
        """Book a start on its fair share."""
        share = self.policy.fair_share
        if share is None or lane.flow is None:
            return
        before = self._virtual_times.get(lane.priority, 0.0)
        self._virtual_times[lane.priority] = max(before, lane.tag)
        flow = lane.flow
        flow.finish = lane.tag + (tokens if share.of == "tokens" else 1.0) / flow.weight + flow.correction
        flow.correction = 0.0

    def _end(self, job: Job, outcome: Outcome, now: float) -> None:
        claim = self._claims.get(job.sequence, self._plain)  # not job's own, if the policy was changed meanwhile
        claim.lane.count(outcome)
        used = None if claim is self._plain else job.used_tokens
        if used is None and outcome is Outcome.REJECTED:
            used = 0.0  # a refused call has used none
        self._give_back(job, now, used=used, refund=False)

    def _take_back(self, most: int | None = None) -> int:
        """Take passes back that are not in use. Returns how many."""
        taken = 0
        while taken != most:
            try:
                self._idle_passes.append(self.passes.pop())
            except IndexError:  # another thread has taken it
                break
            taken += 1
            self._lent -= 1
            self._free += 1
            if not self._bare:  # it was lent under another policy, and has been counted under this one
                for resource in self._plain.lane.resources:
                    resource.give_back(self._plain, self._now, used=None, refund=False)
                    self._offer(resource, self._now)
        return taken

    def _turn_in(self, job: Job) -> bool:
        """Make a job that runs by a pass one of the scheduler's. False: it was ended by somebody else."""
        assert job.lease is not None
        try:
            self._idle_passes.append(job.lease.pop())
        except IndexError:
            return False
        self._lent -= 1
        self._submitted += 1
        job.claim = self._plain
        return True

    def _give_back(self, job: Job, now: float, *, used: float | None, refund: bool) -> None:
        claim = self._claims.pop(job.sequence, self._plain)
        lane = claim.lane
        if claim is not self._plain:
            lane.in_flight -= 1
        share = self.policy.fair_share
        if (
            share is not None
            and lane.flow is not None
            and share.of == "tokens"
            and used is not None
            and claim.reserved is not None
        ):
            settled = (used - claim.reserved) / lane.flow.weight
            lane.flow.finish += settled
            lane.flow.correction += settled
        for resource in lane.resources:
            resource.give_back(claim, now, used=used, refund=refund)
            self._offer(resource, now)

    def _tokens(self, lane: Lane) -> float:
        """What a lane's head will use: its estimate, or else what such calls have used of late."""
        if not self.counts_tokens:
            return 0.0
        tokens = lane.head.claim.tokens
        if tokens is not None:
            return tokens
        return max((found.typical for found in lane.resources if isinstance(found, Bucket)), default=0.0)

    def _look_for_short_way(self, now: float) -> None:
        """Whether nothing but slots is asked for, and whether calls that tell nothing need not be looked at."""
        self._open = self._bare and all(gate.is_through(now) for gate in self._registry.gates.values())
        self._short = self._open and not self.paused and self.refusing is None
        self.closed = not self._short or self._free < 0
        if self.closed:
            self._take_back()


def _again(registry: Registry, old: Claim, now: float) -> Claim:
    """A claim under another policy, with the estimate that it came with."""
    claim = registry.claim(old.meta, now)
    claim.tokens, claim.reserved = old.tokens, old.reserved
    return claim


def _blocker(lane: Lane, tokens: float, source: Resource | None, now: float) -> Resource | None:
    """What keeps a lane's head from starting: something is used up, or who has a better claim to it needs more."""
    for resource in lane.resources:
        if resource.ready_at(tokens, now) > now:
            return resource
        if resource.is_selective and resource is not source and resource.line.goes_before(lane, now):
            return resource
    return None
