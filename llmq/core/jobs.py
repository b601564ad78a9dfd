"""What waits in the scheduler and what comes out of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from enum import Enum, IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmq.core.lanes import Claim


class Priority(IntEnum):
    """Classes of calls; a lower value starts first."""

    URGENT = 0
    HIGH = 1
    NORMAL = 2
    LOW = 3


class Outcome(Enum):
    """The three endings that matter to a limit."""

    SUCCEEDED = "succeeded"
    IGNORED = "ignored"
    """Says nothing about the provider: cancelled, or the caller's own error."""
    REJECTED = "rejected"
    """The provider refused: too fast, too many at once, overloaded."""


class Drop(Enum):
    """Why a job was turned away without having run, though its caller did not leave."""

    FULL = "full"
    """Refused on arrival: the queue was full."""
    OLDEST = "oldest"
    """Made room for a newer one in a full queue."""
    CANCELLED = "cancelled"
    QUOTA = "quota"
    """The provider said that there is no money left."""
    BUDGET = "budget"
    """What may be spent is spent."""
    DRAINING = "draining"
    CLOSED = "closed"


class State(IntEnum):
    """Where a job is; it only moves down this list."""

    NEW = 0
    WAITING = 1
    RUNNING = 2
    ENDED = 3


@dataclass(slots=True)
class LLMTaskMeta:
    """What a caller tells about a call. Everything is optional; nothing here changes the result.

    `priority`, then `rank` (lower first), then arrival decide the order. `tokens` is an estimate of what the
    call will use, prompt and answer together; a rate of tokens reserves it. `labels` are free, short and few: they may
    end up as attributes in telemetry, and a limit may go by them.
    """

    stage: str | None = None
    model_name: str | None = None
    service_id: str | None = None
    request_id: str | None = None
    _: KW_ONLY
    priority: Priority = Priority.NORMAL
    rank: int = 0
    tokens: int | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    def value_of(self, name: str) -> str | None:
        """The field or label that a limit goes by; None where the call has neither."""
        if name in KEYS:
            found: str | None = getattr(self, name)
            return found
        return self.labels.get(name)


KEYS = ("stage", "model_name", "service_id", "request_id")
"""The fields of `LLMTaskMeta` that a limit may go by; any other name is that of a label."""

NO_META = LLMTaskMeta()
"""Of the calls that tell nothing."""


class Job:
    """One attempt's place in the queue. Give it to `Scheduler.submit` once; the scheduler sets the rest.

    `started_at` is None as long as it has not run. A job that ended without having run has a `drop`, unless its caller
    left. `used_tokens` is for the caller to set before `finish`; `waiter` belongs to the caller too: the core never
    looks at it.
    """

    __slots__ = (
        "claim",
        "drop",
        "meta",
        "order",
        "sequence",
        "started_at",
        "state",
        "submitted_at",
        "used_tokens",
        "waiter",
    )

    front = False
    """Whether it goes before its class: an attempt that follows a failed one. Such a job is never refused."""

    lease: list[Pass] | None = None
    """Of a job that runs by a pass: the pass, until somebody has taken it out to give it back."""

    claim: Claim
    drop: Drop | None
    order: Order
    sequence: int
    started_at: float | None
    submitted_at: float
    used_tokens: float | None
    waiter: object

    def __init__(self, meta: LLMTaskMeta = NO_META) -> None:
        self.meta = meta
        self.state = State.NEW


Order = tuple[bool, int, int]
"""Within one lane the least goes first: not front, rank, sequence."""


class Pass:
    """A slot that the scheduler has lent to the short way; see `Scheduler.passes`. `uses` counts its successes."""

    __slots__ = ("uses",)

    def __init__(self) -> None:
        self.uses = 0


class FrontJob(Job):
    """An attempt that follows a failed one."""

    __slots__ = ()

    front = True


@dataclass(slots=True)
class Counts:
    """Of one class or key: attempts that wait, run and have ended, and the longest wait just now in seconds."""

    waiting: int = 0
    in_flight: int = 0
    ended: dict[Outcome, int] = field(default_factory=lambda: dict.fromkeys(Outcome, 0))
    oldest_wait_seconds: float | None = None


@dataclass(slots=True)
class Statistics:
    """Counts of attempts, at one moment.

    `submitted` = `waiting` + `at_door` + `in_flight` + `abandoned` + the sums of `ended` and of `dropped`.
    `at_door` wait for a place in a queue of bounded depth. `oldest_wait_seconds` is None when nobody waits.
    `held_keys` are the models whose refusals hold back their waiters just now. `by_key` has a mapping from key to
    counts for `model_name` and each other name that a limit goes by; keys idle for long fall out of it.
    """

    limit: int
    paused: bool
    in_flight: int
    waiting: int
    at_door: int
    submitted: int
    abandoned: int
    dropped: dict[Drop, int]
    ended: dict[Outcome, int]
    oldest_wait_seconds: float | None
    held_keys: tuple[str | None, ...]
    by_class: dict[Priority, Counts]
    by_key: dict[str, dict[str | None, Counts]]

    def _repr_html_(self) -> str:
        from llmq.cards import statistics_card

        return statistics_card(self)
