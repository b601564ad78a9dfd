"""From measured levels to one number, with the reason.

A level is *feasible* if its 429 share, error share and p95 are within their bounds and neither this client nor the
pipeline kept it from being what it says. Recommended is the smallest feasible level that may have at least 97 % of the
best feasible goodput, each taken with its standard error: the best of several noisy figures is a lucky one. Goodput is
judged, never the total: refusals are fast and look like speed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from llmq.errors import ConfigError
from llmq.tune.point import RATES, Point
from llmq.tune.statistics import SAMPLES_FOR_P95

GOOD_ENOUGH = 0.97
ATTEMPTS_TO_CONFIRM = 400
SECONDS_FOR_A_RATE = 1.0
SATURATED = 1.1
DEVIATIONS_TO_BE_SURE = 2.0
MOST_LONGER = 5
CLEAN_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a level must keep to be feasible."""

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
        if self.slo_p95 is not None and point.service_p95 is not None and point.service_p95 > self.slo_p95:
            return f"p95 over {self.slo_p95:.3g} s"
        return None


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """The recommendation. `level` is None where nothing can be recommended; `reason` then says what to do.

    `binds`: requests, tokens, concurrency, overload, unknown (429s that do not say), errors, slo, server, latency,
    pipeline or client. `yaml` is what to put into `config/app.yaml`.
    """

    level: int | None
    binds: str
    reason: str
    goodput: float | None = None
    share_429: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def yaml(self) -> str:
        """The settings that put the level in force."""
        return "" if self.level is None else f"llm_queue_enabled: true\nllm_queue_concurrency: {self.level}\n"

    def __str__(self) -> str:
        head = "No level can be recommended." if self.level is None else f"Recommended: {self.level} calls at once."
        parts = [head, self.reason, *self.notes]
        return "\n".join(parts) + (f"\n\n{self.yaml}" if self.yaml else "")


def recommend(points: Iterable[Point], bounds: Bounds) -> OperatingPoint:
    """The operating point of a sweep. Pure."""
    points = list(points)
    measured = judged(points)
    feasible = [p for p in measured if bounds.broken_by(p) is None]
    if not measured:
        return OperatingPoint(None, "unknown", "Nothing has been measured yet; let at least one level finish.")
    if not feasible:
        return _refusal(measured, bounds)
    best = max(feasible, key=lambda p: p.goodput - p.goodput_error)
    enough = GOOD_ENOUGH * (best.goodput - best.goodput_error)
    chosen = next(p for p in feasible if p.goodput + p.goodput_error >= enough)
    above = [p for p in measured if p.level > chosen.level]
    binds, why = _what_binds(chosen, above, bounds, _rate_found(points))
    reason = (
        f"It brings {chosen.goodput:.3g} successful calls/s ({chosen.succeeded} in {chosen.window_seconds:.3g} s), "
        f"{_of_best(chosen, max(p.goodput for p in feasible))}, with {chosen.share_429:.1%} refusals "
        f"(95 % interval {chosen.share_429_low:.1%} to {chosen.share_429_high:.1%}). {why}"
    )
    return OperatingPoint(
        chosen.level, binds, reason, chosen.goodput, chosen.share_429, tuple(_notes(chosen, points, bounds, binds))
    )


def judged(points: Iterable[Point]) -> list[Point]:
    """One point a level, in order of level: the one measured longest, of equally long ones the latest; no burst."""
    best: dict[int, Point] = {}
    for point in points:
        known = best.get(point.level)
        if point.purpose != "burst" and (known is None or point.window_seconds >= 0.99 * known.window_seconds):
            best[point.level] = point
    rate = _rate_found(points)
    return [replace(best[level], over_rate=_over(best[level], rate)) for level in sorted(best)]


def _rate_found(points: Iterable[Point]) -> float | None:
    """Calls a second that the provider lets in for good, pooled over the refused points; None where none shows it.

    A busy client sends late what it started, so its points tell too high a rate; they count only for want of others.
    """
    refused = [p for p in points if p.purpose != "burst" and p.admitted_seconds > 0]
    for found in ([p for p in refused if p.limited_by != "client"], refused):
        seconds = sum(p.admitted_seconds for p in found)
        if seconds >= SECONDS_FOR_A_RATE:
            return sum(p.admitted for p in found) / seconds
    return None


def _over(point: Point, rate: float | None) -> float:
    """The share of a level's attempts that `rate` cannot sustain, whatever its bucket held while it was measured."""
    surely = point.goodput - DEVIATIONS_TO_BE_SURE * point.goodput_error
    return max(0.0, 1.0 - rate / surely) if rate and surely > 0 else 0.0


def to_confirm(points: Iterable[Point], bounds: Bounds) -> tuple[int, float] | None:
    """The recommended level and for how many seconds to measure it again, or None. Pure.

    A short clean window proves little: a limit on a rate shows only once its bucket is empty.
    `ATTEMPTS_TO_CONFIRM` without a refusal put the 429 share under 1 % (Wilson, 95 %). Where nothing at all was
    refused, as long as a bucket of a minute needs to show at twice its rate, within five windows.
    """
    points = list(points)
    answer = recommend(points, bounds)
    chosen = next((p for p in judged(points) if p.level == answer.level), None)
    if chosen is None or chosen.attempt_rate <= 0 or any(_confirms(p, chosen) for p in points):
        return None
    seconds = ATTEMPTS_TO_CONFIRM / chosen.attempt_rate
    if not any(p.refused for p in points):
        seconds = max(seconds, CLEAN_SECONDS)
    elif chosen.share_429_high <= bounds.max_429_ratio:
        return None
    return chosen.level, min(seconds, MOST_LONGER * chosen.window_seconds)


def _confirms(point: Point, chosen: Point) -> bool:
    return point.level == chosen.level and point.purpose == "confirm"


def next_level(points: Iterable[Point], bounds: Bounds) -> int | None:
    """The integer between measured levels that would sharpen the recommendation most, or None. Pure.

    Bisects between the recommended level and the next one that is refused, then, where goodput grows less than in
    proportion, between the recommended level and the one below.
    """
    points = list(points)
    chosen = recommend(points, bounds).level
    measured = {p.level: p for p in judged(points)}
    if chosen is None:
        return None
    above = min((p.level for p in measured.values() if p.level > chosen), default=None)
    if above is not None and above - chosen > _resolution(chosen) and _by_provider(measured[above], bounds):
        return (chosen + above) // 2
    below = max((p.level for p in measured.values() if p.level < chosen), default=None)
    if below is not None and chosen - below > _resolution(chosen):
        in_proportion = measured[chosen].goodput * below / chosen
        if measured[below].goodput > 1.1 * in_proportion:
            return (chosen + below) // 2
    return None


def drift(points: Iterable[Point]) -> float | None:
    """Relative change of goodput between a level's first and its repeated measurement; None without one."""
    points = list(points)
    for again in (p for p in points if p.purpose == "drift"):
        first = next((p for p in points if p.level == again.level and p.purpose == "level"), None)
        if first is not None and first.goodput > 0:
            return again.goodput / first.goodput - 1.0
    return None


def _resolution(level: int) -> int:
    """How far apart two levels may stay: an eighth, rounded up."""
    return -(-level // 8)


def _by_provider(point: Point, bounds: Bounds) -> bool:
    """Whether a level is infeasible for what the provider did, so that the edge lies below it."""
    broken = bounds.broken_by(point)
    return broken is not None and broken != f"{point.limited_by}-limited"


def _of_best(chosen: Point, best: float) -> str:
    return "the most of all feasible levels" if chosen.goodput >= best else f"{chosen.goodput / best:.0%} of the best"


def _what_binds(chosen: Point, above: Sequence[Point], bounds: Bounds, rate: float | None) -> tuple[str, str]:
    if not above:
        return "latency", (
            f"More would bring more: it is the highest level measured. Raise the levels beyond {chosen.level}."
        )
    following = above[0]
    refused = next((p for p in above if p.share_429 > bounds.max_429_ratio), None)
    kind = next((p.refused_by for p in above if p.refused_by), "unknown")
    if (
        following.over_rate > bounds.max_429_ratio
        or (refused is not None and refused is following)
        or (refused is not None and _is_beyond(chosen, following, kind, rate))
    ):
        why = f"The provider's limit on {_in_words(kind)} binds"
        if rate is not None and kind in RATES:
            why += f", at {rate:.3g} calls/s"
        return kind, f"{why}: {_refused_at(refused)}." if refused is not None else f"{why}."
    if following.limited_by == "client":
        return "client", (
            f"At {following.level} this client itself was the limit ({_client_evidence(following)}); what the provider "
            "would do there is not known."
        )
    if following.limited_by == "pipeline":
        return "pipeline", (
            f"At {following.level} the pipeline kept only {following.in_flight:.1f} calls in flight: give it more "
            "items, or raise `concurrency`, to use more."
        )
    if bounds.slo_p95 is not None and (following.service_p95 or 0) > bounds.slo_p95:
        return "slo", f"At {following.level} the p95 of {following.service_p95:.3g} s breaks the bound."
    if following.error_share > bounds.max_error_ratio:
        return "errors", f"At {following.level} {following.error_share:.1%} of the calls fail in the end."
    slower = (following.service_mean or 0) / (chosen.service_mean or 1)
    gain = f"{following.goodput / chosen.goodput - 1:+.0%} calls"
    if slower > SATURATED:
        text = (
            f"The provider is saturated: at {following.level} the mean service time is {slower:.2f} times as long, for "
            f"{gain}."
        )
    else:
        text = f"At {following.level} it brings {gain}, too little to tell from chance."
    if refused is None:
        return "server", text
    text += f" Higher up the provider's limit on {_in_words(kind)} shows: {_refused_at(refused)}."
    return ("server" if slower > SATURATED else kind), text


def _is_beyond(chosen: Point, following: Point, kind: str, rate: float | None) -> bool:
    """Whether a level that says nothing itself would, in proportion, need more than the rate that others found."""
    if following.limited_by is None or kind not in RATES or rate is None:
        return False
    return chosen.goodput * following.level / chosen.level > rate


def _refusal(measured: Sequence[Point], bounds: Bounds) -> OperatingPoint:
    """Nothing is feasible: why, and what to do."""
    causes = "; ".join(f"at {p.level}: {bounds.broken_by(p)}" for p in measured)
    lowest = measured[0]
    if lowest.limited_by == "client":
        return OperatingPoint(
            None, "client", f"This client was the limit at every level ({causes}). Measure on a quieter machine."
        )
    if lowest.limited_by == "pipeline":
        return OperatingPoint(
            None, "pipeline", f"There was too little to do at every level ({causes}). Give more items."
        )
    if lowest.refused:
        binds, advice = (
            lowest.refused_by or "unknown",
            ("Even the lowest level is refused: calls must be spaced out in time, or the limit raised."),
        )
    elif lowest.failed:
        binds, advice = "errors", "Look at the errors first: calls fail in the end."
    elif bounds.slo_p95 is not None and lowest.succeeded:
        binds, advice = "slo", "Even the lowest level is slower than the bound: raise it, or ask for less a call."
    else:
        binds, advice = "unknown", "No call ended while it was measured: measure longer."
    return OperatingPoint(None, binds, f"No level keeps the bounds ({causes}). {advice}")


def _notes(chosen: Point, points: Sequence[Point], bounds: Bounds, binds: str) -> Iterable[str]:
    if chosen.succeeded < SAMPLES_FOR_P95:
        yield f"Only {chosen.succeeded} calls: p95 is a rough figure (72 are needed); measure longer."
    if chosen.share_429_high > bounds.max_429_ratio:
        yield (
            f"{chosen.attempts} attempts cannot prove a 429 share under {bounds.max_429_ratio:.0%}; measure longer to "
            "be sure."
        )
    if not any(p.refused for p in points):
        yield (
            f"No limit was met, in {chosen.attempts} calls within {chosen.window_seconds:.3g} s: one on "
            f"{chosen.attempt_rate * 60:.0f} requests a minute or less whose bucket is deeper than that would not "
            "have shown."
        )
    lost = chosen.in_flight - chosen.goodput * (chosen.service_mean or 0.0)
    if binds not in RATES and not chosen.refused and lost > 0.1 * chosen.in_flight and lost > 0.5:
        yield (
            f"Of {chosen.in_flight:.1f} calls in flight {lost:.1f} did not end while it was measured: some hang, or "
            "take far longer than the window. Measure longer."
        )
    changed = drift(points)
    if changed is not None and abs(changed) > 0.1:
        yield f"The provider drifted: the first level, measured again last, brought {changed:+.0%} calls."


def _refused_at(point: Point) -> str:
    return f"at {point.level} it turns {point.share_429:.0%} of the attempts away"


def _client_evidence(point: Point) -> str:
    cpu = "" if point.cpu_share is None else f"{point.cpu_share:.0%} of a core"
    lag = "" if point.loop_lag_p99 is None else f"event-loop lag p99 {point.loop_lag_p99 * 1000:.0f} ms"
    return ", ".join(part for part in (cpu, lag) if part)


def _in_words(kind: str) -> str:
    words = {"requests": "requests per minute", "tokens": "tokens per minute", "concurrency": "calls at once"}
    return words.get(kind, "something it does not name" if kind == "unknown" else kind)
