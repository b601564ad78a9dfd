"""What waits in the scheduler and what comes out of it."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from enum import Enum, IntEnum


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
    call will use. `labels` are free, short and few: they may end up as attributes in telemetry.
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


@dataclass(slots=True, eq=False)
class Job:
    """One attempt's place in the queue. Give it to `Scheduler.submit` once; the scheduler sets the rest.

    `key` groups the jobs that a refusal holds back together (the model). `front` puts a job before its class,
    for an attempt that follows a failed one. `waiter` belongs to the caller; the core never looks at it.
    """

    priority: int = Priority.NORMAL
    rank: int = 0
    key: str | None = None
    front: bool = False
    waiter: object = None
    state: State = State.NEW
    sequence: int = -1
    submitted_at: float = 0.0
    started_at: float = 0.0
    in_ready: bool = False


@dataclass(slots=True)
class Statistics:
    """Counts of attempts, at one moment.

    `submitted` = `waiting` + `in_flight` + `abandoned` + the sum of `ended`. `oldest_wait_seconds` is None when
    nobody waits. `held_keys` are the models whose refusals hold back their waiters just now.
    """

    limit: int
    paused: bool
    in_flight: int
    waiting: int
    submitted: int
    abandoned: int
    ended: dict[Outcome, int]
    oldest_wait_seconds: float | None
    held_keys: tuple[str | None, ...]
