"""Which call starts next, as a state machine of plain functions.

Rules
- A job runs when a slot is free, the scheduler is not paused and the job's key is not held.
- Of the jobs that may run, the least (priority, not front, rank, sequence) starts first. A held key never
  blocks another key's jobs.
- Every input returns the jobs that start because of it, in order; the caller must wake them. A started job
  holds its slot until `finish`, whoever calls it; a second `finish` or `cancel` of one job does nothing.
- Whoever waits, waits for something named: a running job, a pause, or a hold on its key.

How it stays O(log n): the waiting jobs of a key form a *lane* with a heap of its own; `_ready` is a heap of the
lanes' heads. A cancelled job stays in its heaps until it surfaces, and both kinds of heap are rebuilt when
what is dead in them outweighs what lives, so the work is amortised and the memory bounded.
"""

import operator
from collections import OrderedDict
from heapq import heapify, heappop, heappush

from llmq.core.jobs import Job, Outcome, State, Statistics

_Entry = tuple[int, bool, int, int, Job]
_SLACK = 16


class _Lane:
    """The waiting jobs of one key."""

    __slots__ = ("dead", "heap", "holds")

    def __init__(self) -> None:
        self.heap: list[_Entry] = []
        self.dead = 0
        self.holds = 0

    def drop_dead(self) -> None:
        """Take cancelled jobs off the top, or out of the whole heap when they are the larger part."""
        if self.dead > _SLACK and self.dead * 2 > len(self.heap):
            self.heap = [entry for entry in self.heap if entry[4].state is State.WAITING]
            heapify(self.heap)
            self.dead = 0
        while self.heap and self.heap[0][4].state is not State.WAITING:
            heappop(self.heap)
            self.dead -= 1


class Scheduler:
    """Slots under one global cap. Not thread-safe; every method takes the time where it needs it."""

    def __init__(self, limit: int) -> None:
        self.limit = _checked(limit)
        self.paused = False
        self.running: set[Job] = set()
        self._waiting: OrderedDict[int, Job] = OrderedDict()
        self._lanes: dict[str | None, _Lane] = {}
        self._ready: list[_Entry] = []
        self._submitted = 0
        self._abandoned = 0
        self._ended = dict.fromkeys(Outcome, 0)

    @property
    def waiting(self) -> int:
        """How many jobs wait."""
        return len(self._waiting)

    def submit(self, job: Job, now: float) -> list[Job]:
        """Take in a new job."""
        if job.state is not State.NEW:
            raise ValueError(f"job {job.sequence} was submitted before; a job is one attempt, make a new one")
        if not isinstance(job.rank, int) or not isinstance(job.priority, int):
            raise TypeError(f"priority and rank are whole numbers, got {job.priority!r} and {job.rank!r}")
        lane = self._lanes.get(job.key)  # refuses a key that cannot be one, before anything has changed
        job.sequence = self._submitted
        job.submitted_at = now
        self._submitted += 1
        if not self.paused and len(self.running) < self.limit and (lane is None or not lane.holds):
            # Nobody with a better claim can be waiting: they would have been started.
            self._start(job, now)
            return [job]
        job.state = State.WAITING
        self._waiting[job.sequence] = job
        if lane is None:
            lane = self._lanes[job.key] = _Lane()
        heappush(lane.heap, (job.priority, not job.front, job.rank, job.sequence, job))
        self._offer(lane)
        self._trim_ready()
        return []

    def finish(self, job: Job, outcome: Outcome, now: float) -> list[Job]:
        """End a running job, giving its slot on. A job that does not run is left alone."""
        if job.state is not State.RUNNING:
            return []
        job.state = State.ENDED
        self.running.discard(job)
        self._ended[outcome] += 1
        return self._settle(now)

    def cancel(self, job: Job, now: float) -> list[Job]:
        """Take a waiting job out. A running one keeps its slot until `finish`."""
        if job.state is not State.WAITING:
            return []
        job.state = State.ENDED
        self._abandoned += 1
        del self._waiting[job.sequence]
        lane = self._lanes[job.key]
        lane.dead += 1
        lane.drop_dead()
        self._offer(lane)
        self._tidy(job.key, lane)
        return self._settle(now)

    def hold(self, key: str | None, now: float) -> list[Job]:
        """Keep the waiting jobs of `key` from starting until as many `lift` calls came."""
        self._lanes.setdefault(key, _Lane()).holds += 1
        return self._settle(now)

    def lift(self, key: str | None, now: float) -> list[Job]:
        """Take one hold back."""
        lane = self._lanes.get(key)
        if lane is None or not lane.holds:
            return []
        lane.holds -= 1
        self._offer(lane)
        self._tidy(key, lane)
        return self._settle(now)

    def reconfigure(self, now: float, *, limit: int | None = None, paused: bool | None = None) -> list[Job]:
        """Change the cap or pause. Running jobs keep their slots, so a lower cap is reached as they end."""
        if limit is not None:
            self.limit = _checked(limit)
        if paused is not None:
            self.paused = paused
        return self._settle(now)

    def statistics(self, now: float) -> Statistics:
        """What is counted, in O(keys). Changes nothing."""
        oldest = next(iter(self._waiting.values()), None)
        return Statistics(
            limit=self.limit,
            paused=self.paused,
            in_flight=len(self.running),
            waiting=len(self._waiting),
            submitted=self._submitted,
            abandoned=self._abandoned,
            ended=dict(self._ended),
            oldest_wait_seconds=None if oldest is None else now - oldest.submitted_at,
            held_keys=tuple(key for key, lane in self._lanes.items() if lane.holds),
        )

    def check(self) -> None:
        """Raise AssertionError if an invariant does not hold. For tests, after every step."""
        assert all(job.state is State.RUNNING for job in self.running)
        assert all(job.state is State.WAITING for job in self._waiting.values())
        ended = sum(self._ended.values())
        assert self._submitted == len(self._waiting) + len(self.running) + self._abandoned + ended
        in_lanes = 0
        heads = []
        for key, lane in self._lanes.items():
            alive = [entry[4] for entry in lane.heap if entry[4].state is State.WAITING]
            in_lanes += len(alive)
            assert lane.dead == len(lane.heap) - len(alive)
            assert lane.heap or lane.holds, f"empty lane {key!r} was kept"
            if alive and not lane.holds:
                assert lane.heap[0][4].in_ready
                heads.append(lane.heap[0][4])
        assert in_lanes == len(self._waiting)
        assert len(self._ready) <= 2 * len(self._lanes) + _SLACK
        if len(self.running) < self.limit and not self.paused:
            assert not heads, "a slot is free, and a job waits for nothing"

    def _settle(self, now: float) -> list[Job]:
        """Start what can start. The one place where waiting jobs become running ones."""
        started: list[Job] = []
        while self._ready and not self.paused and len(self.running) < self.limit:
            entry = heappop(self._ready)
            job = entry[4]
            job.in_ready = False
            lane = self._lanes.get(job.key)
            if lane is None or lane.holds or not lane.heap or lane.heap[0] is not entry:
                continue  # cancelled, held, or no longer its lane's first
            heappop(lane.heap)
            del self._waiting[job.sequence]
            self._start(job, now)
            started.append(job)
            lane.drop_dead()
            self._offer(lane)
            self._tidy(job.key, lane)
        self._trim_ready()
        return started

    def _start(self, job: Job, now: float) -> None:
        job.state = State.RUNNING
        job.started_at = now
        self.running.add(job)

    def _offer(self, lane: _Lane) -> None:
        """Put a lane's first job among the ready ones, once."""
        if not lane.holds and lane.heap and not lane.heap[0][4].in_ready:
            lane.heap[0][4].in_ready = True
            heappush(self._ready, lane.heap[0])

    def _trim_ready(self) -> None:
        """Leave out what is no lane's head any more, once it is the larger part."""
        if len(self._ready) <= 2 * len(self._lanes) + _SLACK:
            return
        for entry in self._ready:
            entry[4].in_ready = False
        self._ready = [lane.heap[0] for lane in self._lanes.values() if lane.heap and not lane.holds]
        for entry in self._ready:
            entry[4].in_ready = True
        heapify(self._ready)

    def _tidy(self, key: str | None, lane: _Lane) -> None:
        if not lane.heap and not lane.holds:
            del self._lanes[key]


def _checked(limit: int) -> int:
    if operator.index(limit) < 1:
        raise ValueError(f"max_concurrency must be at least 1, got {limit}; to stop starting calls, use pause()")
    return limit
