"""Where jobs wait: in lanes, which stand in lines before what blocks them.

- A **lane** holds the waiting jobs that are alike to every limit: one class, one model, one key for each limit.
  So whatever blocks its first job blocks all of it, and only heads are ever compared.
- A **resource** is what a job takes to run, apart from its slot: a seat under a cap, a part of a rate, an open gate.
- A **line** orders lanes. Every resource has one, for the lanes that it blocks; one more, the scheduler's, is for the
  lanes that may start once a slot is free. A lane stands in one line at most.

A line lets the best class first, and in it the best head: (not front, fair-share tag, rank, arrival). Ageing: a class
that has been standing in a line for `ageing_seconds` gets every fourth place there while better ones also wait,
unless the best of those is strict. So nobody starves, and a backlog of old calls cannot take an urgent one's place.

Entries that no longer hold stay in their heap until they surface or outnumber the others; then it is rebuilt. That
keeps every operation at O(log n) amortised.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Collection
from heapq import heapify, heappop, heappush, heapreplace

from llmq.core.jobs import Job, LLMTaskMeta, Order, Outcome, State

EVERY = 4
"""Of so many starts, one goes to an overdue class."""

CLOCK_JUMP_SECONDS = 1.0
"""A clock that is back by more than this is another clock; by less, it was read before another thread's."""

_SLACK = 16
_WAITING = State.WAITING
_NOBODY = Job()

Entry = tuple[bool, float, int, int, "Lane"]


class Claim:
    """What one job takes from the resources of its lane: kept from its arrival, since its meta may be changed."""

    __slots__ = ("lane", "meta", "reserved", "tokens")

    def __init__(self, lane: Lane, meta: LLMTaskMeta) -> None:
        self.lane = lane
        self.meta = meta
        self.tokens = meta.tokens
        self.reserved: float | None = 0.0  # None: of rates that are no longer in force; nothing is to be settled


class Resource:
    """Something that a job takes to run. Subclasses say when, and count."""

    __slots__ = ("alarm", "key", "line", "offered")

    is_selective = False
    """Whether it can be ready for one job and not for another."""

    def __init__(self, key: str | None, line: Line) -> None:
        self.key = key
        self.line = line
        self.offered: Lane | None = None
        self.alarm: float | None = None

    def ready_at(self, tokens: float, now: float) -> float:
        """When a job of so many tokens may take its part: `now` or before, later, or inf if that hangs on others."""
        raise NotImplementedError

    def take(self, tokens: float, now: float) -> None:
        """Take a job's part."""

    def give_back(self, claim: Claim, now: float, *, used: float | None, refund: bool) -> None:
        """End a job's part. `used` is what it used in tokens, None if unknown; `refund`: it was never sent."""

    def was_late(self, seconds: float, now: float) -> None:
        """The alarm came so late."""

    def clock_went_back(self, now: float) -> None:
        """What was noted lies in the future now."""

    def count_running(self, jobs: int) -> None:
        """Count jobs that run already."""

    def idle(self, now: float) -> bool:
        """Whether forgetting it would change nothing."""
        raise NotImplementedError

    def why(self, tokens: float, now: float) -> str:
        """What a job waits for here, in words."""
        raise NotImplementedError


class Flow:
    """The share of one key in one class.

    `finish` is the virtual time up to which it has had its part; `correction` what was settled in it since its next
    job got its tag.
    """

    __slots__ = ("correction", "finish", "weight")

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.correction = 0.0
        self.finish = 0.0


class Lane:
    """Waiting jobs that are alike to every limit, and the counts of all that ever were.

    Jobs mostly come in the order in which they go: those stand in `_row`, at a constant cost. Those that come with a
    better claim than its last go to `_heap`. The head is the better of the two first ones.
    """

    __slots__ = (
        "_heap",
        "_row",
        "dead",
        "entry",
        "flow",
        "head",
        "ignored",
        "in_flight",
        "is_plain",
        "line",
        "offered_by",
        "priority",
        "rejected",
        "resources",
        "succeeded",
        "tag",
        "values",
        "waiting",
    )

    head: Job
    """Who goes first; there is one as long as somebody waits."""

    def __init__(
        self,
        priority: int,
        values: tuple[str | None, ...],
        resources: tuple[Resource, ...],
        flow: Flow | None,
    ) -> None:
        self.priority = priority
        self.values = values
        self.resources = resources
        self.flow = flow
        self.tag = 0.0
        self._row: deque[Job] = deque()
        self._heap: list[tuple[Order, Job]] = []
        self.dead = 0
        self.waiting: OrderedDict[int, Job] = OrderedDict()
        self.line: Line | None = None
        self.entry: Entry | None = None
        self.offered_by: Resource | None = None
        self.is_plain = False  # the lane of calls that tell nothing: those on the short way are not counted in it
        self.in_flight = self.succeeded = self.ignored = self.rejected = 0

    def add(self, job: Job) -> bool:
        """Let a job wait. Whether it is the new head."""
        job.order = order = (not job.front, job.meta.rank, job.sequence)
        row = self._row
        if not row or row[-1].order < order:
            row.append(job)
        else:
            heappush(self._heap, (order, job))
        self.waiting[job.sequence] = job
        if len(self.waiting) == 1 or order < self.head.order:
            self.head = job
            return True
        return False

    def remove(self, job: Job) -> bool:
        """Take a job out that no longer waits. Whether it was the head."""
        del self.waiting[job.sequence]
        self.dead += 1
        if self.dead > _SLACK and self.dead > len(self.waiting):
            self._row = deque(each for each in self._row if each.state is _WAITING)
            self._heap = [entry for entry in self._heap if entry[1].state is _WAITING]
            heapify(self._heap)
            self.dead = 0
        if self.head is not job:
            return False
        self._find_head()
        return True

    def pop(self) -> Job:
        """Take the head out."""
        job = self.head
        del self.waiting[job.sequence]
        if self._row and self._row[0] is job:
            self._row.popleft()
        else:
            heappop(self._heap)
        self._find_head()
        return job

    def before(self, job: Job) -> int:
        """How many go before a job that waits here."""
        return sum(other.order < job.order for other in self.waiting.values())

    def count(self, outcome: Outcome) -> None:
        """Note how a job ended."""
        if outcome is Outcome.SUCCEEDED:
            self.succeeded += 1
        elif outcome is Outcome.REJECTED:
            self.rejected += 1
        else:
            self.ignored += 1

    def check(self) -> None:
        """Raise AssertionError if an invariant does not hold."""
        jobs = [*self._row, *(job for _, job in self._heap)]
        alive = [job for job in jobs if job.state is _WAITING]
        assert len(jobs) - len(alive) == self.dead
        assert set(alive) == set(self.waiting.values())
        assert not alive or self.head is min(alive, key=lambda job: job.order)

    def _find_head(self) -> None:
        """Drop what no longer waits off both tops, and take the better one."""
        row, heap = self._row, self._heap
        while row and row[0].state is not _WAITING:
            row.popleft()
            self.dead -= 1
        while heap and heap[0][1].state is not _WAITING:
            heappop(heap)
            self.dead -= 1
        if row and not (heap and heap[0][0] < row[0].order):
            self.head = row[0]
        elif heap:
            self.head = heap[0][1]
        else:
            self.head = _NOBODY  # do not keep the last one from collection


class _Rank:
    """The lanes of one class in a line."""

    __slots__ = ("heap", "served", "since", "size")

    def __init__(self) -> None:
        self.heap: list[Entry] = []
        self.size = 0
        self.since = math.inf
        self.served = 0

    def drop_dead(self) -> None:
        """Rebuild the heap when more than half of it no longer holds."""
        if len(self.heap) > 2 * self.size + _SLACK:
            self.heap = [entry for entry in self.heap if entry[4].entry is entry]
            heapify(self.heap)


class Line:
    """Lanes that wait for one thing, best first."""

    __slots__ = ("_ageing_seconds", "_last_served", "_ranks", "_strict", "_turn")

    def __init__(self, ageing_seconds: float | None, strict: Collection[int]) -> None:
        self._ageing_seconds = ageing_seconds
        self._strict = strict
        self._ranks: dict[int, _Rank] = {}
        self._turn = 0
        self._last_served = 0

    def __len__(self) -> int:
        return sum(rank.size for rank in self._ranks.values())

    def __bool__(self) -> bool:
        return any(rank.size for rank in self._ranks.values())

    def add(self, lane: Lane) -> None:
        """Let a lane stand here, in the order of its head."""
        job = lane.head
        not_front, rank_number, sequence = job.order
        rank = self._ranks.get(lane.priority)
        if rank is None:
            rank = self._ranks[lane.priority] = _Rank()
        oldest = next(iter(lane.waiting.values())).submitted_at  # the head may be new
        rank.since = min(rank.since, oldest) if rank.size else oldest
        rank.size += 1
        lane.line = self
        lane.entry = entry = (not_front, lane.tag, rank_number, sequence, lane)
        heappush(rank.heap, entry)
        rank.drop_dead()

    def remove(self, lane: Lane) -> None:
        """Let a lane of this line leave."""
        rank = self._ranks[lane.priority]
        rank.size -= 1
        lane.line = lane.entry = None
        if rank.heap[0][4].entry is not rank.heap[0]:
            heappop(rank.heap)
        rank.drop_dead()

    def renew(self, lane: Lane) -> None:
        """Let the lane that was `best` stand by its next head."""
        rank = self._ranks[lane.priority]
        not_front, rank_number, sequence = lane.head.order
        lane.entry = entry = (not_front, lane.tag, rank_number, sequence, lane)
        heapreplace(rank.heap, entry)

    def best(self, now: float) -> Lane | None:
        """The lane whose turn it is. Asking changes nothing that matters."""
        if len(self._ranks) == 1:
            (rank,) = self._ranks.values()
            return _top(rank) if rank.size else None
        found = self._first()
        if found is None or self._turn < EVERY - 1:
            return found
        overdue = self._overdue(found.priority, now)
        return found if overdue is None else _top(overdue)

    def goes_before(self, lane: Lane, now: float) -> bool:
        """Whether somebody here would have a better claim than a lane that stands nowhere, if it stood here."""
        if not self:
            return False
        self.add(lane)
        best = self.best(now)
        self.remove(lane)
        return best is not lane

    def served(self, priority: int, now: float) -> None:
        """A job of this class took what the line is for."""
        if len(self._ranks) < 2:
            return
        rank = self._ranks.get(priority)
        if rank is not None:
            self._last_served += 1
            rank.served = self._last_served
        first = self._first()
        if first is None or first.priority >= priority:
            self._turn += 1
        else:
            self._turn = 0

    def check(self) -> None:
        """Raise AssertionError if an invariant does not hold."""
        for priority, rank in self._ranks.items():
            standing = [entry for entry in rank.heap if entry[4].entry is entry]
            assert rank.size == len(standing) == len({entry[4] for entry in standing})
            assert len(rank.heap) <= 2 * rank.size + _SLACK
            assert all(entry[4].line is self and entry[4].priority == priority for entry in standing)

    def _first(self) -> Lane | None:
        """The best lane, ageing aside."""
        best = None
        for priority, rank in self._ranks.items():
            if rank.size and (best is None or priority < best):
                best = priority
        return None if best is None else _top(self._ranks[best])

    def _overdue(self, better: int, now: float) -> _Rank | None:
        """The class that ageing lets first: of those overdue the one that was served longest ago."""
        if self._ageing_seconds is None or better in self._strict:
            return None
        overdue = [
            rank
            for priority, rank in self._ranks.items()
            if priority > better and rank.size and now - rank.since >= self._ageing_seconds
        ]
        return min(overdue, key=lambda rank: rank.served, default=None)


def _top(rank: _Rank) -> Lane:
    """The best lane of a class that has one; entries that no longer hold, or no longer at this tag, are put right."""
    heap = rank.heap
    while True:
        entry = heap[0]
        lane = entry[4]
        if lane.entry is not entry:
            heappop(heap)
        elif lane.flow is not None and lane.flow.finish > entry[1]:
            heappop(heap)
            lane.tag = lane.flow.finish
            lane.flow.correction = 0.0
            lane.entry = entry = (entry[0], lane.tag, entry[2], entry[3], lane)
            heappush(heap, entry)
        else:
            return lane
