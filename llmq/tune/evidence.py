"""What the windows of a sweep say together: settings pooled, the limit behind the refusals, drift. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np

from llmq.tune.limits import CALLS_IN_A_PART, RATES, SECONDS_IN_A_PART, RateSeen
from llmq.tune.point import Point, Setting
from llmq.tune.statistics import SURE, wilson

SECONDS_FOR_A_RATE = 1.0
CALLS_FOR_A_RATE = 20
_MOST_AT_RANDOM = 0.25
_HARD_PRESSED = 0.5
_CONFIRMED = 0.1
_CHANGING = 0.75
_UNSTEADY = 0.05
_CALLS_TO_BE_STEADY = 500
_SECONDS_TO_BE_STEADY = 20.0
_CLEARLY_REFUSED = 0.1
_A_QUARTER = 0.25
_FEW_REFUSED = 5


def judged(points: Iterable[Point]) -> list[Point]:
    """One point a setting, its windows pooled, in order of (paced, pace, level); no burst, and not the one for drift.

    Where a limit on a rate was found, `over_rate` says by how much a setting without a pace exceeds it, whatever a
    bucket held. At one pace fewer calls at once are not refused more, so a lower level is proven by a higher one.
    """
    points = list(points)
    limit = limit_found(points)
    rate = None if limit is None else limit.rate
    pooled = _pooled(points)
    return [_proven_by(p, pooled) if p.setting.paced else replace(p, over_rate=_over(p, rate)) for p in pooled]


def _proven_by(point: Point, pooled: Sequence[Point]) -> Point:
    alike = [p for p in pooled if replace(p.setting, level=point.level) == point.setting and p.level >= point.level]
    share = min(p.share_429 for p in alike)
    return replace(point, share_429=share, share_429_high=max(share, min(p.share_429_high for p in alike)))


def _pooled(points: Iterable[Point]) -> list[Point]:
    by_setting: dict[Setting, list[Point]] = {}
    for point in points:
        if point.purpose not in ("burst", "drift"):
            by_setting.setdefault(point.setting, []).append(point)
    found = [reduce(_pool, windows) for windows in by_setting.values()]
    return sorted(found, key=lambda p: (p.setting.paced, p.requests_per_minute or 0, p.tokens_per_minute or 0, p.level))


def _pool(first: Point, second: Point) -> Point:
    """Two windows of one setting as one: counts add up; times are those of the window with more calls."""
    longer = first if first.succeeded >= second.succeeded else second
    seconds = first.window_seconds + second.window_seconds
    a_second = 1.0 / seconds if seconds > 0 else 0.0
    attempts, refused = first.attempts + second.attempts, first.refused + second.refused
    succeeded, failed = first.succeeded + second.succeeded, first.failed + second.failed
    goodput = succeeded * a_second
    half = a_second * math.hypot(
        *((p.goodput_high - p.goodput_low) / 2 * p.window_seconds for p in (first, second) if p.window_seconds > 0)
    )
    tokens, tokens_low, tokens_high = _pool_tokens(first, second)
    share, errors = wilson(refused, attempts), wilson(failed, succeeded + failed)
    return replace(
        longer,
        purpose=first.purpose,
        order=max(first.order, second.order),
        window_seconds=seconds,
        succeeded=succeeded,
        attempts=attempts,
        refused=refused,
        failed=failed,
        retried=first.retried + second.retried,
        goodput=goodput,
        goodput_low=max(0.0, goodput - half),
        goodput_high=goodput + half,
        attempt_rate=attempts * a_second,
        share_429=refused / attempts if attempts else 0.0,
        share_429_low=share.low,
        share_429_high=share.high,
        error_share=failed / (succeeded + failed) if succeeded + failed else 0.0,
        error_share_low=errors.low,
        error_share_high=errors.high,
        in_flight=(first.in_flight * first.window_seconds + second.in_flight * second.window_seconds) * a_second,
        outcomes={
            name: first.outcomes.get(name, 0) + second.outcomes.get(name, 0)
            for name in {**first.outcomes, **second.outcomes}
        },
        refused_by=longer.refused_by or first.refused_by or second.refused_by,
        steady=first.steady and second.steady,
        ok_blocks=first.ok_blocks + second.ok_blocks,
        longest_hold_seconds=max(first.longest_hold_seconds, second.longest_hold_seconds),
        cost=None if first.cost is None or second.cost is None else first.cost + second.cost,
        tokens_per_second=tokens,
        tokens_per_second_low=tokens_low,
        tokens_per_second_high=tokens_high,
        rate=_pool_rates(first.rate, second.rate),
        separation=longer.separation or first.separation or second.separation,
    )


def _pool_tokens(first: Point, second: Point) -> tuple[float | None, float | None, float | None]:
    """Tokens a second of both windows, and their interval; None where one of them has none."""
    seconds = first.window_seconds + second.window_seconds
    mean = square = 0.0
    for p in (first, second):
        if p.tokens_per_second is None or p.tokens_per_second_low is None or p.tokens_per_second_high is None:
            return None, None, None
        mean += p.tokens_per_second * p.window_seconds / seconds
        square += ((p.tokens_per_second_high - p.tokens_per_second_low) / 2 * p.window_seconds / seconds) ** 2
    return mean, max(0.0, mean - math.sqrt(square)), mean + math.sqrt(square)


def _pool_rates(first: RateSeen | None, second: RateSeen | None) -> RateSeen | None:
    if first is None or second is None:
        return first or second
    parts = [r for r in (first, second) if r.slowest is not None or _is_long(r)]
    return RateSeen(
        first.admitted + second.admitted,
        first.tokens + second.tokens,
        first.seconds + second.seconds,
        first.onsets + second.onsets,
        min((r.per_second if r.slowest is None else r.slowest for r in parts), default=None),
        max((r.per_second if r.fastest is None else r.fastest for r in parts), default=None),
    )


def _is_long(rate: RateSeen) -> bool:
    """Whether a window as a whole tells a rate that another window's may be held against."""
    return rate.admitted >= CALLS_IN_A_PART and rate.seconds >= SECONDS_IN_A_PART


def _as_told(rate: RateSeen, kind: str, points: Iterable[Point]) -> RateSeen:
    """The rate that headers tell, where what was let in confirms it: it has no error of its own.

    Headers alone are not believed: over which time a limit counts is the provider's own affair.
    """
    told = max((p.told_per_minute or 0.0 for p in points if p.refused_by == kind), default=0.0)
    seen = rate.tokens if kind == "tokens" else rate.admitted
    if told <= 0 or abs(60 * seen / rate.seconds / told - 1) > _CONFIRMED:
        return rate
    return replace(rate, seconds=60 * seen / told, told=True)


def rate_found(points: Iterable[Point]) -> RateSeen | None:
    """The rate that the provider lets in for good, pooled over the windows that were refused; None where none shows it.

    A window that is refused now and then, as a paced one, is not limited in between and tells too low a rate; so those
    count that are refused most. A busy client sends late what it started, so its windows tell too high a rate; they
    count only for want of others.
    """
    refused = [p for p in points if p.rate is not None and p.rate.seconds > 0 and not p.setting.paced]
    for found in ([p for p in refused if p.limited_by != "client"], refused):
        most = max((p.share_429 for p in found), default=0.0)
        rate = reduce(_pool_rates, (p.rate for p in found if p.share_429 >= _HARD_PRESSED * most), None)
        if rate is not None and rate.seconds >= SECONDS_FOR_A_RATE and rate.admitted >= CALLS_FOR_A_RATE:
            return rate
    return None


def _over(point: Point, rate: RateSeen | None) -> float:
    """The share of a setting's attempts that `rate` cannot sustain, whatever its bucket held while it was measured."""
    surely = point.goodput - 2.0 * point.goodput_error
    return max(0.0, 1.0 - rate.per_second / surely) if rate is not None and surely > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Limit:
    """What the provider's refusals are about. `kind`: requests, tokens, unknown (a rate), concurrency, or random, whose
    share does not depend on the level. `rate` of the first three, `most` in flight of the fourth.

    `changes`: the rate is not the same all the time, so that its mean says little. `span`: the slowest and the fastest
    that were told apart, in calls a second; None where a window that was kept full was only unsteady.
    """

    kind: str
    share: float
    rate: RateSeen | None = None
    most: int | None = None
    changes: bool = False
    span: tuple[float, float] | None = None

    @property
    def lets_in(self) -> float:
        """Calls a second that a limit on a rate lets in at its slowest; 0: not known."""
        seen = [] if self.rate is None else [self.rate.per_second, self.rate.slowest, self.span and self.span[0]]
        return min((rate for rate in seen if rate is not None), default=0.0)


def limit_found(points: Iterable[Point]) -> Limit | None:
    """What the refusals of a sweep are about; None where there are none, or too few to say.

    Without the window for drift: it comes when all is decided.
    """
    points = [p for p in points if p.purpose != "drift"]
    groups = [p for p in _pooled(points) if p.limited_by != "client"]
    if not any(p.refused for p in groups):  # a busy client is refused, too
        groups = _pooled(points)
    refused = [p for p in groups if p.refused]
    attempts = sum(p.attempts for p in groups)
    count = sum(p.refused for p in refused)
    if count < 3:
        return None
    share = count / attempts
    if _is_random(groups):
        return Limit("random", share)
    most_refused = max(refused, key=lambda p: p.refused)
    kinds = [p.refused_by or "unknown" for p in refused for _ in range(p.refused)]
    kind = max(set(kinds), key=kinds.count)
    seen = [p.separation for p in refused if p.separation is not None]
    alike = seen and max(s.let_in for s in seen) <= 1.1 * min(s.let_in for s in seen) + 1
    if kind == "concurrency" or (kind not in ("requests", "tokens") and alike and all(s.clear for s in seen)):
        most = most_refused.separation.let_in if most_refused.separation else None
        return Limit("concurrency", share, most=most)
    kind = kind if kind in RATES else "unknown"
    rate = rate_found(points)
    if rate is None:
        return Limit(kind, share)
    full = [p for p in refused if p.share_429 >= _CLEARLY_REFUSED]
    span = _span(rate, full)
    changes = span is not None or _is_unsteady(full)
    return Limit(kind, share, rate=_as_told(rate, kind, groups), changes=changes, span=span)


def _span(rate: RateSeen, full: Iterable[Point]) -> tuple[float, float] | None:
    """The slowest and the fastest that parts of windows tell, if they tell them apart; `full` were kept full, and so
    clearly refused."""
    seen = [rate, *(p.rate for p in full if p.rate is not None)]
    slowest = min((r.slowest for r in seen if r.slowest is not None), default=math.inf)
    fastest = max((r.fastest for r in seen if r.fastest is not None), default=0.0)
    return (slowest, fastest) if slowest < _CHANGING * fastest else None


def _is_unsteady(full: Iterable[Point]) -> bool:
    """A steady limit lets in what it lets in, to a few per cent; in a few seconds its bucket hides that."""
    return any(
        p.goodput_error > _UNSTEADY * p.goodput
        for p in full
        if p.attempts >= _CALLS_TO_BE_STEADY and p.window_seconds >= _SECONDS_TO_BE_STEADY and not p.setting.paced
    )


def _is_random(groups: Sequence[Point]) -> bool:
    """Whether the share of refusals does not grow with the level: the trend test of Cochran (1954), Armitage (1955).

    Or grows only by as much as may be chance where no limit can be the reason, see `_refused_far_below`. Neither where
    only one level was refused, nor where most is, nor where more concurrency brings no more admissions: that is a limit
    that every level is above.
    """
    groups = [p for p in groups if p.attempts and not p.setting.paced]
    attempts = np.array([p.attempts for p in groups], float)
    refused = np.array([p.refused for p in groups], float)
    share = refused.sum() / attempts.sum() if len(groups) else 1.0
    if sum(p.refused > 0 for p in groups) < 2 or share >= _MOST_AT_RANDOM:
        return False
    scores = np.log2([p.level for p in groups])
    middle = (scores * attempts).sum() / attempts.sum()
    spread = share * (1 - share) * (attempts * (scores - middle) ** 2).sum()
    if spread <= 0:
        return False
    trend = ((refused - attempts * share) * scores).sum() / math.sqrt(spread)
    if any(p.share_429_low > 2 * share for p in groups) or (trend > SURE and not _refused_far_below(groups)):
        return False
    lowest = min((p for p in groups if p.refused), key=lambda p: p.level)
    highest = max(groups, key=lambda p: p.level)
    return highest.goodput > 1.5 * lowest.goodput or lowest.level < highest.level / 8


def _refused_far_below(groups: Sequence[Point]) -> bool:
    """Whether levels that ask for a quarter at most of what others were let in are refused a quarter as much as those,
    and no refusal says why.

    A limit on a rate or on calls at once refuses nothing there, so a trend, however sure it seems, is one of chance: it
    is looked for after each window of the sweep. One that is shared with others may; where refusals name it, it is one.
    """
    if any(p.refused_by not in (None, "unknown") for p in groups):
        return False
    most = max(p.goodput for p in groups)
    low = [p for p in groups if p.attempt_rate <= _A_QUARTER * most]
    refused, attempts = sum(p.refused for p in low), sum(p.attempts for p in low)
    others = sum(p.attempts for p in groups) - attempts
    if refused < _FEW_REFUSED or not others:
        return False
    return refused / attempts >= _A_QUARTER * (sum(p.refused for p in groups) - refused) / others


def drift(points: Iterable[Point]) -> float | None:
    """Relative change of goodput between a level's first and its repeated measurement; None without one."""
    points = list(points)
    for again in (p for p in points if p.purpose == "drift"):
        first = next((p for p in points if p.setting == again.setting and p.purpose == "level"), None)
        if first is not None and first.goodput > 0:
            return again.goodput / first.goodput - 1.0
    return None
