"""The counts that `statistics()` tells: of the lanes that there are, and of those that were forgotten."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llmq.core.jobs import Counts, Outcome, Priority
from llmq.core.lanes import Lane

_KEPT_KEYS = 10_000
"""Of keys of which nothing waits or runs, so many are remembered at least."""

ByKey = dict[str, dict[str | None, Counts]]


class Census:
    """Counts by class and by key. Those by class are complete for ever."""

    def __init__(self) -> None:
        self._past: dict[tuple[str, Any], Counts] = {}

    def remember(self, lane: Lane, keys: tuple[str, ...]) -> None:
        """Keep what ended in a lane that is to be forgotten; of keys, those of the newest."""
        counts = Counts(ended=_counts(lane, 0.0).ended)
        for name in [("class", lane.priority), *zip(keys, lane.values, strict=True)]:
            _add(self._past.setdefault(name, Counts()), counts)
        if len(self._past) > 2 * _KEPT_KEYS:
            classes = {name: past for name, past in self._past.items() if name[0] == "class"}
            self._past = classes | dict(list(self._past.items())[-_KEPT_KEYS:])

    def tell(
        self, lanes: Iterable[Lane], plain: Counts, keys: tuple[str, ...], now: float
    ) -> tuple[dict[Priority, Counts], ByKey]:
        """By class, and by key. `plain`: of the calls that tell nothing."""
        by_class = {priority: Counts() for priority in Priority}
        by_key: ByKey = {name: {} for name in keys}
        for (name, key), past in self._past.items():
            if name == "class":
                _add(by_class[Priority(key)], past)
            elif name in by_key:
                _add(by_key[name].setdefault(key, Counts()), past)
        nothing = (None,) * len(keys)
        of_lanes = [(lane.priority, lane.values, _counts(lane, now)) for lane in lanes]
        for priority, values, counts in [*of_lanes, (Priority.NORMAL, nothing, plain)]:
            _add(by_class[Priority(priority)], counts)
            if counts.waiting or counts.in_flight or any(counts.ended.values()):
                for name, key in zip(keys, values, strict=True):
                    _add(by_key[name].setdefault(key, Counts()), counts)
        return by_class, by_key

    def ended(self, lanes: Iterable[Lane]) -> int:
        """How many have ended in all lanes that ever were."""
        past = sum(sum(counts.ended.values()) for (name, _), counts in self._past.items() if name == "class")
        return past + sum(lane.succeeded + lane.ignored + lane.rejected for lane in lanes)


def _counts(lane: Lane, now: float) -> Counts:
    oldest = next(iter(lane.waiting.values()), None)
    ended = {
        Outcome.SUCCEEDED: lane.succeeded,
        Outcome.IGNORED: lane.ignored,
        Outcome.REJECTED: lane.rejected,
    }
    return Counts(len(lane.waiting), lane.in_flight, ended, None if oldest is None else now - oldest.submitted_at)


def _add(total: Counts, counts: Counts) -> None:
    total.waiting += counts.waiting
    total.in_flight += counts.in_flight
    for outcome, number in counts.ended.items():
        total.ended[outcome] += number
    if counts.oldest_wait_seconds is not None:
        total.oldest_wait_seconds = max(total.oldest_wait_seconds or 0.0, counts.oldest_wait_seconds)
