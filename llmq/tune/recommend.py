"""From measured windows to one operating point, with the reason, or to a refusal with what to do next. Pure.

- Goodput is judged, never the total: refusals are fast and look like speed.
- Recommended is the smallest setting that is good enough (`llmq.tune.standing`).
- Where a limit on a rate was met, a pace belongs to the answer.
- Refusals whose share does not grow with concurrency are not caused by it, and nothing is lowered for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from llmq.tune.evidence import drift, judged, limit_found
from llmq.tune.point import Point, Setting
from llmq.tune.standing import (
    GOOD_ENOUGH,
    Bounds,
    Standing,
    bounded_p95,
    calls_to_decide,
    in_force,
    level_interval,
    rounded_down,
    standing,
)
from llmq.tune.statistics import SAMPLES_FOR_P95
from llmq.words import number

SATURATED = 1.1
DRIFTED = 0.1
_AGREES = 1.7
_IN_PROPORTION = 0.85


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """The recommendation. `level` None: nothing can be recommended; `reason` then says why, `next_steps` what to do.

    `binds`: requests, tokens, unknown (a rate that does not say of what, or nothing to tell by), concurrency, server,
    latency, arrivals (an open loop below capacity), pipeline, client, slo or errors. With a pace,
    `requests_per_minute` or `tokens_per_minute` belongs to the answer.
    `services_open`: the `concurrency` to set where the pipeline binds. `*_low`, `*_high`: 95 % intervals; of the
    level by drawing every setting's goodput from its own. `confidence`: how often, in these draws, the level is good
    enough; lower where cross-checks disagree. `waste`: what the present setting wastes, in words.
    """

    level: int | None
    binds: str
    reason: str
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    services_open: int | None = None
    goodput: float | None = None
    goodput_low: float | None = None
    goodput_high: float | None = None
    share_429: float | None = None
    share_429_high: float | None = None
    level_low: int | None = None
    level_high: int | None = None
    confidence: float | None = None
    waste: str | None = None
    next_steps: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def setting(self) -> Setting | None:
        """What to set, pace included."""
        if self.level is None:
            return None
        return Setting(self.level, self.requests_per_minute, self.tokens_per_minute)

    @property
    def yaml(self) -> str:
        """The settings that put it in force."""
        if self.level is None:
            return ""
        return "".join(f"{name}: {str(value).lower()}\n" for name, value in self.settings.items())

    @property
    def settings(self) -> dict[str, bool | int | float]:
        """What to put into the settings file."""
        if self.level is None:
            return {}
        found: dict[str, bool | int | float] = {"llm_queue_enabled": True, "llm_queue_concurrency": self.level}
        if self.requests_per_minute is not None:
            found["llm_queue_requests_per_minute"] = rounded_down(self.requests_per_minute)
        if self.tokens_per_minute is not None:
            found["llm_queue_tokens_per_minute"] = rounded_down(self.tokens_per_minute)
        if self.services_open is not None:
            found["concurrency"] = self.services_open
        return found

    def __str__(self) -> str:
        setting = self.setting
        if setting is None:
            head = "No level can be recommended."
        else:
            pace = f", starts paced at {setting.pace}" if setting.paced else ""
            head = f"Recommended: {setting.level} calls at once{pace}."
        parts = [head, self.reason, *filter(None, [self.waste]), *self.notes, *self.next_steps]
        return "\n".join(parts) + (f"\n\n{self.yaml}" if self.yaml else "")

    def _repr_html_(self) -> str:
        from llmq.tune.cards import point_card

        return point_card(self)


def recommend(points: Iterable[Point], bounds: Bounds, *, present: int | None = None) -> OperatingPoint:
    """The operating point of a sweep, or a refusal. `present`: the calls at once that are set now. Pure."""
    points = list(points)
    groups = judged(points)
    if not groups:
        return OperatingPoint(None, "unknown", "Nothing has been measured yet; let at least one level finish.")
    found = standing(points, bounds)
    if not found.feasible:
        return _nothing_feasible(groups, in_force(points, bounds))
    chosen = found.chosen
    if chosen is None:
        return _undecided(points, found, bounds)
    binds, why = _what_binds(chosen, points, bounds)
    unproven = in_force(points, bounds).unproven_by(chosen)
    if unproven is not None:
        return _unproven(chosen, binds, unproven, in_force(points, bounds))
    low, high, confidence = level_interval(found, chosen)
    checks = list(_cross_checks(chosen, found))
    best = found.best
    share = (
        "the most of all feasible settings" if chosen is best else f"{chosen.goodput / best.goodput:.0%} of the best"
    )
    reason = (
        f"It brings {number(chosen.goodput)} successful calls/s (95 % interval {number(chosen.goodput_low)} to "
        f"{number(chosen.goodput_high)}), {share}, with {chosen.share_429:.1%} refusals (at most "
        f"{chosen.share_429_high:.1%}). {why}"
    )
    return OperatingPoint(
        chosen.level,
        binds,
        reason,
        chosen.requests_per_minute,
        chosen.tokens_per_minute,
        _services_open(chosen, judged(points)) if binds == "pipeline" else None,
        goodput=chosen.goodput,
        goodput_low=chosen.goodput_low,
        goodput_high=chosen.goodput_high,
        share_429=chosen.share_429,
        share_429_high=chosen.share_429_high,
        level_low=low,
        level_high=high,
        confidence=min(confidence, 0.8) if checks else confidence,
        waste=None if present is None else _waste(present, chosen, groups),
        notes=(*checks, *_notes(chosen, points, bounds, binds)),
    )


# --- in words


def _what_binds(chosen: Point, points: Sequence[Point], bounds: Bounds) -> tuple[str, str]:
    groups = [p for p in judged(points) if not p.setting.paced]
    above = [p for p in groups if p.level > chosen.level]
    limit = limit_found(points)
    worst = max(groups, key=lambda p: p.share_429, default=chosen)
    if limit is not None and limit.kind == "concurrency":
        most = "" if limit.most is None else f": it never lets more than {limit.most} in"
        return "concurrency", f"The provider's limit on calls at once binds{most}; {_refused_at(worst)}."
    if limit is not None and limit.rate is not None:
        rate = limit.rate
        text = f"The provider's limit on {_in_words(limit.kind)} binds, at {number(rate.per_second)} calls/s"
        if chosen.goodput > 1.02 * rate.per_second:
            text += f" at least: {number(chosen.goodput)} were let in at that pace"
        if limit.kind == "tokens" and rate.tokens:
            text += f" or {number(rate.tokens / rate.seconds * 60)} tokens/min"
        how = "as its headers say and" if rate.told else "by"
        text += f" ({how} {rate.admitted} calls let in between refusals): {_refused_at(worst)}."
        if limit.span is not None:
            text += f" It changes: {number(limit.span[0])} to {number(limit.span[1])} calls/s were seen."
        elif limit.changes:
            text += " It was not let in evenly, so the limit may change."
        return limit.kind, text
    if chosen.offered_rate is not None and chosen.goodput >= _IN_PROPORTION * chosen.offered_rate:
        return "arrivals", f"All that arrives is served: {number(chosen.offered_rate)} calls/s arrive."
    if not above:
        return _at_the_top(chosen, [p for p in groups if p.level < chosen.level])
    following = above[0]
    if following.limited_by == "client":
        return "client", (
            f"At {following.level} this client itself was the limit ({_client_evidence(following)}); what the provider "
            "would do there is not known."
        )
    if following.limited_by == "pipeline":
        return "pipeline", (
            f"At {following.level} the pipeline kept only {following.in_flight:.1f} calls in flight: "
            f"{_more_open(following)}."
        )
    p95, _ = bounded_p95(following)
    if bounds.slo_p95 is not None and (p95 or 0) > bounds.slo_p95:
        return "slo", f"At {following.level} the p95 of {number(p95 or 0.0)} s breaks the bound."
    if following.error_share > bounds.max_error_ratio:
        return "errors", f"At {following.level} {following.error_share:.1%} of the calls fail in the end."
    highest = above[-1]
    if highest.limited_by is None and chosen.level >= 0.9 * highest.level and limit is None:
        return "latency", (
            f"More would bring more: {highest.level}, the highest level measured, brings hardly more than in "
            f"proportion. Raise the levels beyond {highest.level}."
        )
    slower = (highest.service_mean or 0) / (chosen.service_mean or 1)
    gain = f"{highest.goodput / chosen.goodput - 1:+.0%} calls"
    if slower > SATURATED:
        return "server", (
            f"The provider is saturated: at {highest.level} the mean service time is {slower:.2f} times as long, for "
            f"{gain}."
        )
    if limit is not None:
        return limit.kind, f"At {highest.level} it brings {gain}; {_refused_at(worst)}."
    return "server", f"At {highest.level} it brings {gain}, too little to tell from chance."


def _at_the_top(chosen: Point, below: Sequence[Point]) -> tuple[str, str]:
    """What the highest level measured says, against those below."""
    lower = next((p for p in reversed(below) if p.level <= 0.75 * chosen.level and p.goodput > 0), None)
    if lower is None:
        return "unknown", "It is the only level measured thereabouts: what more or fewer would bring is not known."
    if chosen.goodput / lower.goodput >= _IN_PROPORTION * chosen.level / lower.level:
        return "latency", (
            f"More would bring more: it is the highest level measured, and brings "
            f"{number(chosen.goodput / lower.goodput, 2)} times what {lower.level} brings. Raise the levels beyond "
            f"{chosen.level}."
        )
    return "server", (
        f"The provider is nearing its capacity: {chosen.level} bring {chosen.goodput / lower.goodput - 1:+.0%} calls, "
        f"held against {lower.level}."
    )


def services_open(point: Point) -> int | None:
    """How many items must be open to fill a level that the pipeline left unfilled, in proportion; None: not known."""
    if point.open_items is None or point.in_flight <= 0:
        return None
    return math.ceil(point.level * point.open_items / point.in_flight)


def _services_open(chosen: Point, groups: Sequence[Point]) -> int | None:
    return next((services_open(p) for p in groups if p.level > chosen.level and p.limited_by == "pipeline"), None)


def _more_open(point: Point) -> str:
    needed = services_open(point)
    return "give more items" if needed is None else f"give more items, or raise `concurrency` to about {needed}"


def _nothing_feasible(groups: Sequence[Point], bounds: Bounds) -> OperatingPoint:
    """Nothing keeps the bounds: why, and what to do."""
    causes = "; ".join(f"at {p.setting}: {bounds.broken_by(p)}" for p in groups)
    lowest = groups[0]
    if lowest.limited_by == "client":
        why, advice = f"This client was the limit at every level ({causes}).", "Measure on a quieter machine."
        return OperatingPoint(None, "client", why, next_steps=(advice,))
    if lowest.limited_by == "pipeline":
        why = f"There was too little to do at every level ({causes})."
        advice = f"{_more_open(lowest).capitalize()}, and measure again."
        return OperatingPoint(None, "pipeline", why, next_steps=(advice,))
    if lowest.refused:
        binds = lowest.refused_by or "unknown"
        advice = "Even the lowest level is refused: measure lower levels or longer, or have the limit raised."
    elif lowest.failed:
        binds, advice = "errors", "Look at the errors first: calls fail in the end."
    elif bounds.slo_p95 is not None and lowest.succeeded:
        binds, advice = "slo", "Even the lowest level is slower than the bound: raise it, or ask for less a call."
    else:
        binds, advice = "unknown", "No call ended while it was measured: measure longer."
    return OperatingPoint(None, binds, f"No level keeps the bounds ({causes}).", next_steps=(advice,))


def _undecided(points: Sequence[Point], found: Standing, bounds: Bounds) -> OperatingPoint:
    candidate = next(p for p in found.feasible if not found.out(p))
    rival = found.rival(candidate)
    calls = calls_to_decide(found, candidate)
    brings, rivals = (f"{number(p.goodput)} ± {number(1.96 * p.goodput_error, 2)}" for p in (candidate, rival))
    reason = (
        f"Undecided: {candidate.setting} calls at once bring {brings} successful calls/s, {rival.setting} bring "
        f"{rivals}; that cannot tell whether the first has {GOOD_ENOUGH:.0%} of the second."
    )
    limit = limit_found(points)
    return OperatingPoint(
        None,
        "unknown" if limit is None else limit.kind,
        reason,
        next_steps=(f"Measure longer: about {calls} calls at each of the two would decide it.",),
    )


def _unproven(chosen: Point, binds: str, why: str, bounds: Bounds) -> OperatingPoint:
    calls = max(bounds.attempts_to_prove, 2 * chosen.attempts if chosen.refused or chosen.failed else 0)
    return OperatingPoint(
        None,
        binds,
        f"{chosen.setting} calls at once look right, at {number(chosen.goodput)} successful calls/s, but {why}.",
        next_steps=(f"Measure longer: about {calls} attempts at this setting would do.",),
    )


def _cross_checks(chosen: Point, found: Standing) -> Iterable[str]:
    """What disagrees, in words: a two-segment fit of goodput, and power, goodput by p95 (Giessler et al. 1978)."""
    unpaced = [p for p in found.feasible if not p.setting.paced]
    if len(unpaced) < 4 or chosen not in unpaced:
        return
    knee = two_segment_knee([p.level for p in unpaced], [p.goodput for p in unpaced])
    if chosen.level < unpaced[-1].level and not 1 / _AGREES <= chosen.level / knee <= _AGREES:
        yield f"A two-segment fit puts the knee at {knee:.0f}: the curve is not of that shape, so be careful."
    power = {p.level: p.goodput / p.service_p95 for p in unpaced if p.service_p95}
    if len(power) < len(unpaced):
        return
    strongest = max(power, key=power.__getitem__)
    if not 1 / _AGREES <= chosen.level / strongest <= _AGREES:
        yield f"Goodput by p95 is best at {strongest}: what is above buys calls with time, so look at p95."


def two_segment_knee(levels: Sequence[float], goodput: Sequence[float]) -> float:
    """Where a line through the origin meets a level line, by least squares over all break points."""
    x, y = np.asarray(levels, float), np.asarray(goodput, float)
    best, knee = math.inf, float(x[-1])
    for count in range(1, len(x)):
        slope = float((x[:count] * y[:count]).sum() / (x[:count] ** 2).sum())
        flat = float(y[count:].mean())
        misfit = float(((y[:count] - slope * x[:count]) ** 2).sum() + ((y[count:] - flat) ** 2).sum())
        if misfit < best:
            best, knee = misfit, flat / slope if slope > 0 else float(x[-1])
    return knee


def _waste(present: int, chosen: Point, groups: Sequence[Point]) -> str | None:
    """What the setting in force wastes, from the measured levels around it."""
    unpaced = [p for p in groups if not p.setting.paced and p.limited_by is None]
    if not unpaced or chosen.goodput <= 0:
        return None
    levels = [0.0, *(float(p.level) for p in unpaced)]
    brings = float(np.interp(present, levels, [0.0, *(p.goodput for p in unpaced)]))
    refused = float(np.interp(present, levels, [0.0, *(p.share_429 for p in unpaced)]))
    if refused > 0.02:
        return f"You run {present}: about {refused:.0%} of its attempts are refused."
    if brings < GOOD_ENOUGH * chosen.goodput:
        return f"You run {present}: about {brings / chosen.goodput:.0%} of what {chosen.setting} brings."
    if present > 1.25 * chosen.level:
        return f"You run {present}: {present - chosen.level} calls at once more than are needed."
    return None


def _notes(chosen: Point, points: Sequence[Point], bounds: Bounds, binds: str) -> Iterable[str]:
    limit = limit_found(points)
    if limit is not None and limit.kind == "random":
        yield (
            f"{limit.share:.1%} of all attempts are refused, at every level alike: concurrency does not cause it, so "
            "nothing was lowered for it."
        )
    if chosen.succeeded < SAMPLES_FOR_P95:
        yield f"Only {chosen.succeeded} calls: p95 is a rough figure (72 are needed); measure longer."
    if not any(p.refused for p in points):
        yield (
            f"No limit was met, in {chosen.attempts} calls within {number(chosen.window_seconds)} s: one on "
            f"{chosen.attempt_rate * 60:.0f} requests a minute or less whose bucket is deeper than that would not "
            "have shown."
        )
    if not chosen.steady:
        yield "The second half of its window was not like the first: the provider changes, or warms up; measure longer."
    lost = chosen.in_flight - chosen.goodput * (chosen.service_mean or 0.0)
    if not any(p.refused for p in points) and lost > 0.1 * chosen.in_flight and lost > 0.5:
        yield (
            f"Of {chosen.in_flight:.1f} calls in flight {lost:.1f} did not end while it was measured: some hang, or "
            "take far longer than the window. Measure longer."
        )
    changed = drift(points)
    if changed is not None and abs(changed) > DRIFTED and _is_real(points):
        yield f"The provider drifted: the first level, measured again last, brought {changed:+.0%} calls."


def _is_real(points: Sequence[Point]) -> bool:
    """Whether the drift is more than the errors of both windows."""
    again = next(p for p in points if p.purpose == "drift")
    first = next(p for p in points if p.setting == again.setting and p.purpose == "level")
    return abs(again.goodput - first.goodput) > 2 * math.hypot(first.goodput_error, again.goodput_error)


def _refused_at(point: Point) -> str:
    return f"at {point.level} it turns {point.share_429:.{0 if point.share_429 >= 0.01 else 1}%} of the attempts away"


def _client_evidence(point: Point) -> str:
    cpu = "" if point.cpu_share is None else f"{point.cpu_share:.0%} of a core"
    lag = "" if point.loop_lag_p99 is None else f"event-loop lag p99 {point.loop_lag_p99 * 1000:.0f} ms"
    return ", ".join(part for part in (cpu, lag) if part)


def _in_words(kind: str) -> str:
    words = {"requests": "requests per minute", "tokens": "tokens per minute", "concurrency": "calls at once"}
    return words.get(kind, "something it does not name" if kind == "unknown" else kind)
