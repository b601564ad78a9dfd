"""Everything that the scheduler is told: limits and order, as one value that can be replaced while it runs."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from llmq.core.capacity import Cap, Depth
from llmq.core.jobs import Priority
from llmq.core.rates import Rate

Overflow = Literal["wait", "reject", "drop_oldest"]

AGEING_SECONDS = 60.0


@dataclass(frozen=True)
class FairShare:
    """Share the slots of a class between the values of `by`, in proportion to their `weights` (1 where not said).

    Shares are of calls or of tokens, and only among those that have something waiting: what one does not use goes to
    the others. Within one value, rank and arrival decide. Start-time fair queueing (Goyal, Vin and Cheng, 1996).
    Raises ValueError and TypeError.
    """

    by: str
    weights: Mapping[str | None, float] = field(default_factory=dict)
    of: Literal["calls", "tokens"] = "calls"

    def __post_init__(self) -> None:
        if not isinstance(self.by, str) or not self.by:
            raise TypeError(f"a fair share goes by the name of a field or label, got by={self.by!r}")
        if self.of not in ("calls", "tokens"):
            raise ValueError(f"a fair share is of calls or tokens; got of={self.of!r}")
        for key, weight in self.weights.items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
                raise ValueError(f"the weight of {self.by} {key} must be a number more than 0, got {weight!r}")


@dataclass(frozen=True)
class Policy:
    """Limits and order.

    `limits` are any number of `Cap`, `Rate` and `Depth`. Without one, only `max_concurrency` bounds. A class that has
    waited `ageing_seconds` gets every fourth start (None: never), except before the classes in `strict`.
    Raises ValueError and TypeError.
    """

    max_concurrency: int = 3
    limits: tuple[Cap | Rate | Depth, ...] = ()
    overflow: Overflow = "wait"
    ageing_seconds: float | None = AGEING_SECONDS
    strict: frozenset[Priority] = frozenset()
    fair_share: FairShare | None = None

    def __post_init__(self) -> None:
        if operator.index(self.max_concurrency) < 1:
            raise ValueError(
                f"max_concurrency must be at least 1, got {self.max_concurrency}; to stop starting calls, use pause()"
            )
        for limit in self.limits:
            if not isinstance(limit, (Cap, Rate, Depth)):
                raise TypeError(f"limits are Cap, Rate or Depth values, got {limit!r}")
        seen: set[object] = set()
        for limit in self.limits:
            if (kind := identity(limit)) in seen:
                raise ValueError(f"two limits of the same kind: {limit}; state the stricter one alone")
            seen.add(kind)
        for priority in self.strict:
            if not isinstance(priority, Priority):
                raise TypeError(f"strict is a set of Priority values, got {priority!r}")
        if self.fair_share is not None and not isinstance(self.fair_share, FairShare):
            raise TypeError(f"fair_share is a FairShare or None, got {self.fair_share!r}")
        if self.overflow not in ("wait", "reject", "drop_oldest"):
            raise ValueError(f"overflow is wait, reject or drop_oldest; got {self.overflow!r}")
        if self.ageing_seconds is not None and not 0 <= self.ageing_seconds < math.inf:
            raise ValueError(f"ageing_seconds must be at least 0, or None for never; got {self.ageing_seconds!r}")

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of fields and labels that make a difference to some limit, the model's first."""
        named = [limit.by for limit in self.limits]
        if self.fair_share is not None:
            named.append(self.fair_share.by)
        return tuple(dict.fromkeys(["model_name", *(by for by in named if by is not None)]))

    @property
    def depths(self) -> tuple[Depth, ...]:
        """The bounds on waiting."""
        return tuple(limit for limit in self.limits if isinstance(limit, Depth))


def identity(limit: Cap | Rate | Depth) -> tuple[object, ...]:
    """What stays when a limit's figures are changed."""
    if isinstance(limit, Rate):
        return Rate, limit.of, limit.per, limit.by
    return type(limit), limit.by
