"""What a sweep measures next. Pure: from the windows so far, the levels asked for and the bounds.

1. The levels that were asked for, in their shuffled order; none that is far above one that is surely refused.
2. What would sharpen the answer: where a rate binds, the rate itself, then a pace just below it, slower where that is
   refused; where the next level up breaks a bound, whole levels up to it; then whole levels down to the smallest that
   is good enough; more samples where a comparison is undecided, or a bound not proven. In real time this may take
   twice as long as what was asked for, half a minute at least; what cannot be had in the time left is not begun.
3. Last the first level again, to see drift.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from llmq.tune.evidence import Limit, judged, limit_found
from llmq.tune.guard import CLEAN_SECONDS, Extra
from llmq.tune.limits import RATES, RateSeen
from llmq.tune.point import Point, Purpose, Setting
from llmq.tune.standing import (
    A_LITTLE_SLOWER,
    AT_THE_EDGE,
    ATTEMPTS_TO_PROVE,
    PACE_SHARE,
    Bounds,
    Standing,
    brings_more,
    calls_to_decide,
    in_force,
    pace_held,
    rounded_down,
    standing,
)

FAR_ABOVE = 4
MOST_MORE = 3
_MORE_CLOSE_BY = 2
_CALLS_FOR_THE_RATE = 250
_SLOWEST_PACE = 0.2
_CLOSE_PACES = 1.012
_CLOSER_PACES = 1.008
_FAR_SLOWER = 0.985
_CLEARLY_SLOWER = 0.97
_SLOWER = 0.9
_FASTER = 1.04
_FEW_CALLS = 20
_CLOSE_LEVELS = 1.25
_MOST_AT_ONCE = 2
_LONG_ENOUGH = 0.8
"""Of a window that was wished for: what is unsettled in it does not count."""


@dataclass(frozen=True, slots=True)
class Step:
    """What to measure next: so many usual windows long, with so many attempts and seconds at least. `extra`: the
    sweep's own wish, and not asked for."""

    setting: Setting
    purpose: Purpose = "level"
    windows: float = 1.0
    calls: int = 0
    seconds: float = 0.0
    extra: bool = False
    most_seconds: float = math.inf


def next_step(points: Sequence[Point], order: Sequence[int], bounds: Bounds, extra: Extra) -> Step | None:
    """The next window of a sweep over the levels of `order`; None: done."""
    known = {p.setting for p in points if p.purpose != "burst"}
    wanted = [level for level in order if Setting(level) not in known and not _pointless(level, points, bounds)]
    if wanted:
        return Step(Setting(wanted[0]))
    if any(p.purpose == "drift" for p in points):
        return None
    if extra.windows > 0 and extra.seconds > 0:
        step = _sharpening(points, order, in_force(points, bounds), extra)
        if step is not None:
            return replace(step, most_seconds=extra.seconds)
    return Step(Setting(order[0]), "drift")


def steps_left(points: Sequence[Point], order: Sequence[int], bounds: Bounds) -> int:
    """How many windows are left at least."""
    known = {p.setting for p in points if p.purpose != "burst"}
    wanted = sum(Setting(level) not in known and not _pointless(level, points, bounds) for level in order)
    return max(1, wanted + (not any(p.purpose == "drift" for p in points)))


def _pointless(level: int, points: Sequence[Point], bounds: Bounds) -> bool:
    """Whether a level is so far above one that the provider refuses that it can only be refused more."""
    limit = limit_found(points)
    if limit is None or limit.kind == "random":
        return False
    refused = [p for p in judged(points) if p.share_429_low > bounds.max_429_ratio and p.limited_by is None]
    return any(level >= FAR_ABOVE * p.level for p in refused)


def _sharpening(points: Sequence[Point], order: Sequence[int], bounds: Bounds, extra: Extra) -> Step | None:
    limit = limit_found(points)
    if limit is not None and limit.kind in RATES:
        step = _for_the_rate(points, limit) or _for_the_pace(points, limit, order, bounds)
        if step is not None:
            return step
    found = standing(points, bounds)
    if not found.feasible:
        return _lower(points)
    return (
        _upwards(points, found, limit, bounds)
        or _downwards(points, found, limit, extra)
        or _undecided(points, found)
        or _to_prove(points, found, bounds, extra)
    )


def _for_the_rate(points: Sequence[Point], limit: Limit) -> Step | None:
    """The lowest refused level for longer, until the rate is known to half a per cent."""
    if limit.rate is not None and limit.rate.admitted >= _CALLS_FOR_THE_RATE:
        return None
    refused = [p for p in judged(points) if p.refused and not p.setting.paced and p.limited_by is None]
    if not refused:
        return None
    lowest = max(refused[:2], key=lambda p: p.share_429)
    missing = _CALLS_FOR_THE_RATE - (limit.rate.admitted if limit.rate else 0)
    per_second = limit.rate.per_second if limit.rate else lowest.goodput
    seconds = missing / per_second if per_second > 0 else 0.0
    return _more(points, lowest.setting, windows=2.0, seconds=seconds)


def _for_the_pace(points: Sequence[Point], limit: Limit, order: Sequence[int], bounds: Bounds) -> Step | None:
    """The next pace to try, at a level that is surely enough for it: rate * L + 3 sqrt(rate * L), L by Little's law."""
    rate = limit.rate
    if rate is None:
        return None
    by_tokens = limit.kind == "tokens" and rate.tokens > 0
    told = max((p.told_per_minute or 0.0 for p in points if p.refused_by == limit.kind), default=0.0)
    paced = [p for p in judged(points) if p.setting.paced]
    pace = _next_pace(paced, limit, rate, bounds, PACE_SHARE * told, by_tokens=by_tokens)
    if pace is None:
        return None
    in_flight = pace / 60 * _service_seconds(points)
    level = min(max(order), math.ceil(in_flight + 3 * math.sqrt(in_flight)))
    if by_tokens:
        setting = Setting(level, tokens_per_minute=round(pace * rate.tokens / rate.admitted))
    else:
        setting = Setting(level, requests_per_minute=rounded_down(pace))
    if any(p.setting == setting for p in points):
        return None
    return Step(setting, "between", 3.0 if limit.changes else 1.0, calls=ATTEMPTS_TO_PROVE, extra=True)


def _next_pace(
    paced: Sequence[Point], limit: Limit, rate: RateSeen, bounds: Bounds, told: float, *, by_tokens: bool
) -> float | None:
    """Requests a minute to try next, None: found. Just below the rate; then below what was refused; above what was
    clean where the limit changes, so that its mean says little, or headers tell a higher one; and between. What
    was found so is at the edge, so a little slower last."""
    if not paced:
        return PACE_SHARE * 60 * rate.per_second
    calls_per_token = rate.admitted / rate.tokens if by_tokens else 0.0

    def pace(point: Point) -> float:
        return (point.tokens_per_minute or 0.0) * calls_per_token if by_tokens else point.requests_per_minute or 0.0

    held = [p for p in paced if pace_held(p, paced)]
    clean = [p for p in held if p.share_429_high <= bounds.max_429_ratio]
    refused = [p for p in paced if p not in clean and (p.share_429 > 0 or p not in held)]
    fastest = max(map(pace, clean), default=0.0)
    above = [p for p in refused if pace(p) > fastest]
    if not clean and not refused:
        return None
    if not above:
        told *= calls_per_token if by_tokens else 1.0
        if limit.changes:
            return _FASTER * fastest
        return told if told > _FASTER * fastest else None
    slowest = min(above, key=pace)
    if not clean:
        own: list[float | None] = [slowest.attempt_rate * (1 - slowest.share_429)]
        own += [] if slowest.rate is None else [slowest.rate.per_second, slowest.rate.slowest]
        below = [60 * PACE_SHARE * found for found in [*own, rate.slowest] if found is not None]
        found = max([p for p in below if p < _CLEARLY_SLOWER * pace(slowest)], default=_SLOWER * pace(slowest))
        return found if found > _SLOWEST_PACE * 60 * rate.per_second else None
    if pace(slowest) > (_CLOSER_PACES if limit.changes else _CLOSE_PACES) * fastest:
        return math.sqrt(fastest * pace(slowest))
    if limit.changes and not any(_FAR_SLOWER * fastest < pace(p) < AT_THE_EDGE * fastest for p in clean):
        return A_LITTLE_SLOWER * fastest
    return None


def _lower(points: Sequence[Point]) -> Step | None:
    """Nothing is feasible: half of the lowest level, if it is the provider that says no."""
    lowest = next((p for p in judged(points) if not p.setting.paced), None)
    if lowest is None or lowest.level == 1 or lowest.limited_by is not None:
        return None
    return Step(Setting(lowest.level // 2), "between", extra=True)


def _upwards(points: Sequence[Point], found: Standing, limit: Limit | None, bounds: Bounds) -> Step | None:
    """Between the highest feasible level and the next, where the provider breaks a bound there."""
    highest = found.feasible[-1]
    if highest.setting.paced or highest is not found.best:
        return None
    above = [p for p in judged(points) if not p.setting.paced and p.level > highest.level]
    if not above or above[0].limited_by is not None or bounds.broken_by(above[0]) is None:
        return None
    gap = above[0].level - highest.level
    exact = limit is not None and limit.kind == "concurrency"
    if exact and limit is not None and limit.most == highest.level:
        return None  # refusals have told it
    if gap <= (1 if exact else max(1, highest.level // 8)):
        return None
    level = highest.level + gap // 2
    if exact and limit is not None and limit.most is not None and highest.level < limit.most < above[0].level:
        level = limit.most
    return Step(Setting(level), "between", extra=True)


def _downwards(points: Sequence[Point], found: Standing, limit: Limit | None, extra: Extra) -> Step | None:
    """Between the smallest that is shown to be good enough and the highest that cannot be.

    By Little's law a level N cannot bring more than N calls by service time.
    """
    chosen = found.chosen
    if chosen is None:
        return None
    lowest = judged(points)[0]
    if chosen.level > 1 and not chosen.setting.paced and chosen.level == lowest.level:
        return Step(Setting(chosen.level // 2), "between", extra=True)  # its service time may be that of a crowd
    floor = math.floor(0.95 * found.needed * found.best.goodput * _service_seconds(points))
    below = [
        p for p in judged(points) if p.level < chosen.level and replace(p.setting, level=chosen.level) == chosen.setting
    ]
    done = [p for p in below if p not in found.feasible or found.out(p) or not _worthwhile(points, p, found, extra)]
    floor = max([floor, *(p.level for p in done)])
    if floor >= chosen.level or chosen.level - floor <= max(1, math.ceil(extra.coarseness * floor)):
        return None
    open_ones = [p for p in below if p.level > floor]
    if open_ones:
        return _sample(points, found, open_ones[-1])
    if extra.seconds * chosen.attempt_rate < ATTEMPTS_TO_PROVE:
        return None
    level = floor + max(1, (chosen.level - floor) // 3)
    windows = 3.0 if limit is not None and limit.changes else 1.0
    return Step(replace(chosen.setting, level=level), "between", windows, calls=ATTEMPTS_TO_PROVE, extra=True)


def _worthwhile(points: Sequence[Point], point: Point, found: Standing, extra: Extra) -> bool:
    """Whether to look longer at a level that is neither good enough for sure nor out. Less so close to one that is; and
    not where it looks too little after as many calls as tell two apart that are alike: it is right at the bound."""
    if point.succeeded >= calls_to_decide(found, point) and found.looks_out(point):
        return False
    close = found.chosen is not None and found.chosen.level <= _CLOSE_LEVELS * point.level
    most = _MORE_CLOSE_BY if close else MOST_MORE
    return _times_more(points, point.setting) < most and _decidable(found, point, extra)


def _decidable(found: Standing, candidate: Point, extra: Extra) -> bool:
    """Whether what is left is long enough to tell a candidate from its rival, if they are alike."""
    calls = calls_to_decide(found, candidate)
    pair = {p.setting: p for p in (candidate, found.rival(candidate))}.values()
    return sum(max(0, calls - p.succeeded) / p.goodput for p in pair if p.goodput > 0) <= extra.seconds


def _undecided(points: Sequence[Point], found: Standing) -> Step | None:
    if found.chosen is not None:
        return None
    candidates = [p for p in found.feasible if not found.out(p)]
    steps = (_sample(points, found, candidate) for candidate in candidates)
    return next((step for step in steps if step is not None), None)


def _sample(points: Sequence[Point], found: Standing, candidate: Point) -> Step | None:
    """More of a candidate or its rival, whichever is less certain."""
    pair = sorted((candidate, found.rival(candidate)), key=lambda p: -p.goodput_error)
    calls = calls_to_decide(found, candidate)
    for point in pair:
        step = _more(points, point.setting, calls=min(calls - point.succeeded, _MOST_AT_ONCE * point.attempts))
        if step is not None:
            return step
    return None


def _to_prove(points: Sequence[Point], found: Standing, bounds: Bounds, extra: Extra) -> Step | None:
    """The chosen one once more, and for longer until its bounds are proven and a limit on a rate had time to show; and
    once more the next above it, which should bring more.

    Such a limit shows only once its bucket is empty. Where nothing was refused at all, a minute shows one whose bucket
    is a minute deep at twice its rate, and five minutes, where they are few calls or cost none, at 1.2 times its rate.
    """
    chosen = found.chosen
    if chosen is None:
        return None
    for point in found.feasible:
        if point.level <= chosen.level and found.shown(point) and bounds.unproven_by(point) is not None:
            missing = max(bounds.attempts_to_prove - point.attempts, point.attempts // 2)
            step = _more(points, point.setting, calls=missing)
            if step is not None and missing <= extra.seconds * point.attempt_rate:
                return step
    held = max(p.window_seconds for p in points if p.setting == chosen.setting)
    least, most = CLEAN_SECONDS
    wished = min(max(least, min(most, extra.clean_calls / chosen.attempt_rate)), extra.seconds / 2)
    if not any(p.refused for p in points) and held < _LONG_ENOUGH * wished:
        step = _more(points, chosen.setting, seconds=wished, most=MOST_MORE + 1)
        if step is not None:
            return step
    step = _again(points, chosen, extra)  # it was chosen for a lucky window, more often than not
    if step is not None:
        return step
    above = next((p for p in found.feasible if p.level > chosen.level and not p.setting.paced), None)
    if above is not None and not brings_more(above, chosen):
        step = _again(points, above, extra, windows=2.0)  # and was not chosen for an unlucky one
        if step is not None:
            return step
    if not chosen.steady:
        return _more(points, chosen.setting, windows=2.0, most=2)
    return None


def _again(points: Sequence[Point], point: Point, extra: Extra, *, windows: float = 1.0) -> Step | None:
    """Once more, if it has been looked at but once, and there is time."""
    calls = min(ATTEMPTS_TO_PROVE, point.attempts)
    if _times_more(points, point.setting) > 0 or calls > extra.seconds * point.attempt_rate:
        return None
    return _more(points, point.setting, windows=windows, calls=calls)


def _more(
    points: Sequence[Point],
    setting: Setting,
    *,
    windows: float = 1.0,
    calls: int = 0,
    seconds: float = 0.0,
    most: int = MOST_MORE,
) -> Step | None:
    if _times_more(points, setting) >= most:
        return None
    return Step(setting, "more", windows, calls, seconds, extra=True)


def _times_more(points: Iterable[Point], setting: Setting) -> int:
    return sum(p.setting == setting and p.purpose == "more" for p in points)


def _service_seconds(points: Iterable[Point]) -> float:
    """The service time where nothing is crowded: the least mean of any setting."""
    times = [p.service_mean for p in judged(points) if p.service_mean is not None and p.succeeded >= _FEW_CALLS]
    return min(times, default=0.0)
