"""Caps: how many at once, in all, by key, and waiting."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

from llmq.core.jobs import Job
from llmq.core.lanes import CLOCK_JUMP_SECONDS, Claim, Line, Resource


@dataclass(frozen=True)
class Cap:
    """At most `limit` calls in flight, in all or for each value of `by`.

    `by` names a field of `LLMTaskMeta` (`model_name`, `service_id`, `stage`, `request_id`) or a label. `overrides` are
    the limits of single values. Calls that lack it count together, as the value None. Raises ValueError.

    >>> Cap(4, by="agent", overrides={"writer": 1}).limit_of("writer")
    1
    """

    limit: int
    by: str | None = None
    overrides: Mapping[str | None, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_limits("a cap", self.limit, self.by, self.overrides)

    def limit_of(self, key: str | None) -> int:
        """The limit for one value."""
        return self.overrides.get(key, self.limit)

    def resource(self, key: str | None, line: Line) -> Seats:
        """What enforces it for one value."""
        return Seats(key, line, self.limit_of(key), self.by)


class Seats(Resource):
    """The calls in flight under one cap."""

    __slots__ = ("by", "limit", "taken")

    def __init__(self, key: str | None, line: Line, limit: int, by: str | None) -> None:
        super().__init__(key, line)
        self.limit = limit
        self.by = by
        self.taken = 0

    def ready_at(self, tokens: float, now: float) -> float:
        """Now, or when a call ends."""
        return now if self.taken < self.limit else math.inf

    def take(self, tokens: float, now: float) -> None:
        """Take a seat."""
        self.taken += 1

    def give_back(self, claim: Claim, now: float, *, used: float | None, refund: bool) -> None:
        """Leave it."""
        self.taken -= 1

    def count_running(self, jobs: int) -> None:
        """Let jobs that run already have seats, be there so many or not."""
        self.taken += jobs

    def idle(self, now: float) -> bool:
        """Whether nobody sits."""
        return not self.taken

    def why(self, tokens: float, now: float) -> str:
        """Which cap, and how many are in flight under it."""
        return f"one of {self.limit} calls at once{of(self.by, self.key)}, all taken"


class Gate(Resource):
    """Keeps one model's jobs from starting until a time: the provider said when to come back. Then it lets them through
    one by one for a while, and not as a herd."""

    __slots__ = ("gap", "held_at", "open_at", "wide_open_at")

    def __init__(self, key: str | None, line: Line) -> None:
        super().__init__(key, line)
        self.held_at = self.open_at = self.wide_open_at = -math.inf
        self.gap = 0.0

    def hold(self, until: float, now: float, spread_seconds: float = 0.0, slots: int = 1) -> None:
        """Stay closed until then, at least; then open by so much that `slots` jobs get through in `spread_seconds`."""
        self.held_at = now
        self.open_at = max(self.open_at, until)
        self.wide_open_at = self.open_at + spread_seconds
        self.gap = spread_seconds / slots

    def let_back(self, until: float, now: float) -> None:
        """Open, if it was to open then; not if somebody has closed it for longer."""
        if self.open_at <= until:
            self.open_at = min(self.open_at, now)

    def follow(self, other: Gate) -> None:
        """Be as closed as another one."""
        self.held_at, self.open_at = other.held_at, other.open_at
        self.wide_open_at, self.gap = other.wide_open_at, other.gap

    def clock_went_back(self, now: float) -> None:
        """Open: the time that was said can no longer be told."""
        self.open_at = self.wide_open_at = min(self.open_at, now)

    def ready_at(self, tokens: float, now: float) -> float:
        """When it opens."""
        return self.open_at if now >= self.held_at - CLOCK_JUMP_SECONDS else now

    def take(self, tokens: float, now: float) -> None:
        """Let nobody else through for a moment."""
        if now < self.wide_open_at:
            self.open_at = now + self.gap

    def idle(self, now: float) -> bool:
        """Whether it is wide open."""
        return now >= self.wide_open_at and self.ready_at(0, now) <= now

    def is_through(self, now: float) -> bool:
        """Whether it is open, and all that it kept back have been let go."""
        return not self.line and self.offered is None and self.idle(now)

    def why(self, tokens: float, now: float) -> str:
        """What closed it, and for how long."""
        return f"the provider's Retry-After{of('model_name', self.key)}, over in {self.open_at - now:.1f} s"


@dataclass(frozen=True)
class Depth:
    """At most `limit` calls waiting, in all or for each value of `by`; see `Cap` for `by` and `overrides`."""

    limit: int
    by: str | None = None
    overrides: Mapping[str | None, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_limits("a depth", self.limit, self.by, self.overrides, least=0)

    def limit_of(self, key: str | None) -> int:
        """The limit for one value."""
        return self.overrides.get(key, self.limit)


class Places:
    """The waiting jobs that one depth has accepted, each class in order of arrival; and who stands at its door."""

    __slots__ = ("by", "door", "inside", "key", "limit", "taken")

    def __init__(self, key: str | None, limit: int, by: str | None) -> None:
        self.key = key
        self.limit = limit
        self.by = by
        self.taken = 0
        self.inside: dict[int, OrderedDict[int, Job]] = {}
        self.door: list[tuple[int, Job]] = []

    @property
    def full(self) -> bool:
        """Whether nobody else may wait here."""
        return self.taken >= self.limit

    def enter(self, job: Job) -> None:
        """Take a place."""
        self.inside.setdefault(job.claim.lane.priority, OrderedDict())[job.sequence] = job
        self.taken += 1

    def leave(self, job: Job) -> None:
        """Give it up, if the job had one: those that follow a failed attempt were accepted before and have none."""
        jobs = self.inside.get(job.claim.lane.priority)
        if jobs is not None and jobs.pop(job.sequence, None) is not None:
            self.taken -= 1

    def oldest_of_lowest_class(self) -> Job | None:
        """Whom a newer one may push out."""
        for priority in sorted(self.inside, reverse=True):
            for job in self.inside[priority].values():
                return job
        return None

    def describe(self) -> str:
        """The limit, in words."""
        return f"{self.taken} of {self.limit} waiting{of(self.by, self.key)}"


def of(by: str | None, key: str | None) -> str:
    """` for model_name m`, or nothing."""
    return "" if by is None else f" for {by} {key}"


def check_limits(
    what: str, limit: float, by: str | None, overrides: Mapping[str | None, float], *, least: int | None = 1
) -> None:
    """Raise ValueError or TypeError for what is no limit. `least` None: any number above 0, whole or not."""
    if by is not None and (not isinstance(by, str) or not by):
        raise TypeError(f"{what} goes by the name of a field or label, got by={by!r}")
    if overrides and by is None:
        raise ValueError(f"{what} in all has no overrides; say by which field or label they go (by=...)")
    for key, value in [(None, limit), *overrides.items()]:
        name = what if value is limit else f"{what} for {by} {key}"
        if isinstance(value, bool) or not isinstance(value, int if least is not None else (int, float)):
            raise TypeError(f"{name} is a {'whole ' if least is not None else ''}number, got {value!r}")
        if not (value > 0 if least is None else value >= least) or value == math.inf:
            raise ValueError(f"{name} must be {'more than 0' if least is None else f'at least {least}'}, got {value}")
