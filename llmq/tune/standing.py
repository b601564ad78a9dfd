"""Which settings are good enough, and how sure that is. Pure.

- A setting is *feasible* if its 429 share, error share and p95 keep their bounds and neither this client nor the
  pipeline kept it from being what it says. It is *proven* if the intervals of these lie within the bounds, too.
- Good enough is what is *shown*, at 95 % confidence, to have at least 97 % of the best feasible goodput (a one-sided z
  test). The best of several noisy figures is a lucky one, so the best is the mean of all that are not shown to bring
  less than it; those far less certain are left out. What is shown to have less than 97 % is *out*; what is neither
  asks for more samples.
- A limit on a rate has no knee: slots alone cannot hold it. Then settings of one pace are compared, 99 % of the rate
  found, and good enough is what is shown to bring 97.5 % of that rate, which is known to half a per cent: that is
  98.5 % of the pace. Of two levels at one pace the higher never brings less, so the highest is good enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from llmq.errors import ConfigError
from llmq.tune.evidence import judged, limit_found
from llmq.tune.point import Point
from llmq.tune.statistics import SURE
from llmq.words import number

GOOD_ENOUGH = 0.97
PACE_SHARE = 0.99
"""Of the rate found: so much is asked for, so that its error and jitter cost no refusals."""

ATTEMPTS_TO_PROVE = 400
"""Without a refusal they put the share under 1 % (Wilson, 95 %: 381)."""

DRAWS = 2000
A_LITTLE_SLOWER = 0.995
"""Than the fastest clean pace: what is asked for where the limit changes."""

AT_THE_EDGE = 0.998
"""What is closer to the fastest clean pace than this was found by being just not refused, as that was."""

_RATE_ERROR = 0.005
_FAR_LESS_CERTAIN = 3.0
_TOO_WIDE = 0.2
_Z_SQUARED = 1.96**2
_LEAST_PROVABLE = 0.001
_HELD = 0.93


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a setting must keep to be feasible."""

    max_429_ratio: float = 0.01
    max_error_ratio: float = 0.01
    slo_p95: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_429_ratio", "max_error_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is a share between 0 and 1, got {getattr(self, name)}")
        if self.slo_p95 is not None and not self.slo_p95 > 0:
            raise ConfigError(f"slo_p95 must be more than 0 seconds, got {self.slo_p95}")

    def broken_by(self, point: Point) -> str | None:
        """Which bound a point breaks, in words, or None."""
        if point.share_429 > self.max_429_ratio:
            return f"429 share over {self.max_429_ratio:.0%}"
        if point.over_rate > self.max_429_ratio:
            return f"{point.over_rate:.0%} over the rate found"
        if point.limited_by is not None:
            return f"{point.limited_by}-limited"
        if point.succeeded == 0:
            return "nothing succeeded"
        if point.error_share > self.max_error_ratio:
            return f"error share over {self.max_error_ratio:.0%}"
        p95, _ = bounded_p95(point)
        if self.slo_p95 is not None and p95 is not None and p95 > self.slo_p95:
            return f"p95 over {number(self.slo_p95)} s"
        return None

    def unproven_by(self, point: Point) -> str | None:
        """Which bound a feasible point may break for all that its samples say, in words, or None."""
        if point.share_429_high > self._provable(self.max_429_ratio):
            return f"{point.attempts} attempts cannot prove a 429 share under {number(self.max_429_ratio)}"
        if point.error_share_high > self._provable(self.max_error_ratio):
            calls = point.succeeded + point.failed
            return f"{calls} calls cannot prove an error share under {number(self.max_error_ratio)}"
        if self.slo_p95 is not None:
            p95, high = bounded_p95(point)
            if p95 is None or high is None or high > self.slo_p95:
                return f"{point.succeeded} calls cannot prove a p95 under {number(self.slo_p95)} s"
        if point.goodput_high - point.goodput_low > _TOO_WIDE * point.goodput:
            return f"its goodput is not known well enough ({number(point.goodput_low)} to {number(point.goodput_high)})"
        return None

    @property
    def attempts_to_prove(self) -> int:
        """So many attempts without a refusal or failure put their share under the bound (Wilson, 95 %)."""
        least = min(self._provable(self.max_429_ratio), self._provable(self.max_error_ratio))
        return math.ceil(1.05 * _Z_SQUARED * (1 - least) / least)

    @staticmethod
    def _provable(ratio: float) -> float:
        return max(ratio, _LEAST_PROVABLE)


def bounded_p95(point: Point) -> tuple[float | None, float | None]:
    """What `slo_p95` bounds, and the upper end of its interval: the service time, or an open loop's response time."""
    if point.offered_rate is not None:
        return point.response_p95, point.response_p95_high
    return point.service_p95, point.service_p95_high


@dataclass(frozen=True, slots=True)
class Standing:
    """Where the feasible settings of a pool stand, in order of level: against each other, or against their one pace.

    `needed`: the share of a rival's goodput, or of the pace, that is good enough.
    """

    feasible: tuple[Point, ...]
    needed: float
    bounds: Bounds

    def shown(self, point: Point) -> bool:
        """At 95 % confidence it has the needed share."""
        return self._margin(point) >= SURE

    def out(self, point: Point) -> bool:
        """At 95 % confidence it has less than the needed share."""
        return self._margin(point) <= -SURE

    def looks_out(self, point: Point) -> bool:
        """It has less than the needed share, whether or not that is sure."""
        return self._margin(point) < 0

    def needs(self, point: Point) -> tuple[float, float] | None:
        """What it must bring to be good enough, with the standard error of that; None: it is good enough anyway.

        Of its pace, a share. Else a share of the best other goodput, or rather of the mean of those that are not shown
        to be less, weighted by their certainty: the best of several noisy figures is a lucky one.
        """
        if point.setting.paced:
            return None if point is self.feasible[-1] else (self.needed_of_pace, 0.0)
        rivals = self._rivals(point)
        if not rivals:
            return None
        weights = [1 / p.goodput_error**2 if p.goodput_error > 0 else math.inf for p in rivals]
        if math.inf in weights:
            return self.needed * max(p.goodput for p in rivals), 0.0
        mean = sum(w * p.goodput for w, p in zip(weights, rivals, strict=True)) / sum(weights)
        return self.needed * mean, self.needed / math.sqrt(sum(weights))

    def rival(self, point: Point) -> Point:
        """The best of the others; itself where there is none."""
        return max(self._rivals(point), key=lambda p: p.goodput_low, default=point)

    @property
    def needed_of_pace(self) -> float:
        """The share of the pace that is good enough; less than `needed` where even the highest level surely misses it,
        since calls fail."""
        reached, error = share_of_pace(self.feasible[-1])
        return self.needed * min(1.0, reached + 2.0 * error)

    def _margin(self, point: Point) -> float:
        """By how many standard errors it is above what it needs."""
        needs = self.needs(point)
        if needs is None:
            return math.inf
        value, error = _judged_by(point)
        error = math.hypot(error, needs[1])
        return (value - needs[0]) / error if error > 0 else math.copysign(math.inf, value - needs[0])

    def _rivals(self, point: Point) -> list[Point]:
        """The best other setting, and those that are not shown to bring less; none at a pace."""
        others = [p for p in self.feasible if p is not point and not p.setting.paced]
        best = max(others, key=lambda p: p.goodput_low, default=point)
        certain = _FAR_LESS_CERTAIN * best.goodput_error
        others = [p for p in others if p is best or p.goodput_error <= certain]
        return [p for p in others if not brings_more(best, p)]

    @property
    def best(self) -> Point:
        """From whom surely the most is to be had, by the lower end of its interval."""
        return max(self.feasible, key=lambda p: p.goodput_low)

    @property
    def chosen(self) -> Point | None:
        """The smallest that is shown to be good enough and proven to keep its bounds; failing that, shown at least."""
        shown = [p for p in self.feasible if self.shown(p)]
        proven = [p for p in shown if self.bounds.unproven_by(p) is None]
        return next(iter(proven or shown), None)


def brings_more(point: Point, other: Point) -> bool:
    """Whether it is shown, at 95 % confidence, to bring more than the other."""
    return point.goodput - other.goodput > SURE * math.hypot(point.goodput_error, other.goodput_error)


def share_of_pace(point: Point) -> tuple[float, float]:
    """How much of its pace a paced setting brings, and the standard error of that."""
    if point.requests_per_minute is not None:
        return 60 * point.goodput / point.requests_per_minute, 60 * point.goodput_error / point.requests_per_minute
    a_share = 60 / (point.tokens_per_minute or math.inf)
    error = ((point.tokens_per_second_high or 0.0) - (point.tokens_per_second_low or 0.0)) / (2 * 1.96)
    return a_share * (point.tokens_per_second or 0.0), a_share * error


def _judged_by(point: Point) -> tuple[float, float]:
    return share_of_pace(point) if point.setting.paced else (point.goodput, point.goodput_error)


def standing(points: Iterable[Point], bounds: Bounds) -> Standing:
    """The pool that the answer comes from: where a rate binds, settings of the fastest clean pace, else the others."""
    points = list(points)
    groups = judged(points)
    bounds = in_force(points, bounds)
    feasible = [p for p in groups if bounds.broken_by(p) is None]
    limit = limit_found(points)
    if limit is not None and limit.rate is not None:
        paced = [p for p in feasible if p.setting.paced]
        if paced:
            paced = [p for p in paced if pace_held(p, paced)] or paced
            proven = [p for p in paced if bounds.unproven_by(p) is None] or paced
            fastest = max(_off_the_edge(proven) if limit.changes else proven, key=_pace_of)
            pool = [p for p in paced if _pace_of(p) == _pace_of(fastest)]
            return Standing(tuple(pool), (GOOD_ENOUGH + _RATE_ERROR) / PACE_SHARE, bounds)
    return Standing(tuple(p for p in feasible if not p.setting.paced), GOOD_ENOUGH, bounds)


def _off_the_edge(paced: Sequence[Point]) -> Sequence[Point]:
    """Those a little slower than the fastest, if there are any: the fastest was found by being just not refused."""
    edge = AT_THE_EDGE * max(map(_pace_of, paced))
    return [p for p in paced if _pace_of(p) < edge] or paced


def in_force(points: Iterable[Point], bounds: Bounds) -> Bounds:
    """The bounds, without the one on refusals where these are not caused by concurrency."""
    limit = limit_found(points)
    if limit is None or limit.kind != "random" or limit.share <= bounds.max_429_ratio / 2:
        return bounds
    return replace(bounds, max_429_ratio=1.0)


def pace_held(point: Point, paced: Iterable[Point]) -> bool:
    """Whether a pace was reached at the highest level that was measured with it; else it is not what binds there."""
    alike = [p for p in paced if replace(p.setting, level=point.level) == point.setting]
    highest = max(alike, key=lambda p: p.level, default=point)
    if highest.requests_per_minute is not None:
        return 60 * highest.attempt_rate >= _HELD * highest.requests_per_minute
    if highest.tokens_per_minute is not None and highest.tokens_per_second is not None:
        return 60 * highest.tokens_per_second >= _HELD * highest.tokens_per_minute
    return True


def rounded_down(pace: float) -> float:
    """To a whole number, a slow one to three digits."""
    digits = max(0, 2 - math.floor(math.log10(pace)))
    down = math.floor(pace * (1 + 1e-9) * 10**digits) / 10**digits
    return int(down) if digits == 0 else down


def _pace_of(point: Point) -> float:
    return point.requests_per_minute or point.tokens_per_minute or 0.0


def calls_to_decide(found: Standing, candidate: Point) -> int:
    """How many calls a candidate and its rival each need, so that, if they are alike, it is shown."""
    pair = {p.setting: p for p in (candidate, found.rival(candidate))}.values()
    margin = (1 - found.needed) / SURE
    relative = [error / value * math.sqrt(p.succeeded) for p in pair for value, error in [_judged_by(p)] if value > 0]
    return math.ceil(len(pair) * max(relative, default=1.0) ** 2 / margin**2)


def level_interval(found: Standing, chosen: Point) -> tuple[int, int, float]:
    """The 2.5 and 97.5 % quantile of the level, and how often the chosen one is good enough, when every setting's
    goodput is drawn anew from its interval (a parametric bootstrap; the intervals come from blocks of time)."""
    random = np.random.default_rng(0)
    levels = np.array([p.level for p in found.feasible])
    enough = np.ones((DRAWS, len(levels)), bool)
    for column, point in enumerate(found.feasible):
        needs = found.needs(point)
        if needs is not None:
            enough[:, column] = random.normal(*_judged_by(point), DRAWS) >= random.normal(*needs, DRAWS)
    smallest = levels[np.argmax(enough, axis=1)]
    low, high = np.quantile(smallest, [0.025, 0.975], method="nearest")
    return int(low), int(high), float(enough[:, found.feasible.index(chosen)].mean())
