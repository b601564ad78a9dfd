"""What is drawn against the level: goodput, 429 share, times, and where a level is not feasible."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.ticker import PercentFormatter

from llmq.tune.figures import (
    ACCENT,
    FAINT,
    GROUND,
    INK,
    WARNING,
    at_least,
    dress,
    label_points,
    label_right,
    level_axis,
    level_limits,
    seconds_axis,
)
from llmq.tune.report import short
from llmq.tune.statistics import SAMPLES_FOR_P95
from llmq.words import number

if TYPE_CHECKING:
    from llmq.tune.point import Point
    from llmq.tune.recommend import OperatingPoint
    from llmq.tune.standing import Bounds
    from llmq.tune.sweep import Sweep

LEAST_SECONDS = 1e-4
"""A time of next to nothing has no place on a logarithmic scale."""
_HATCHES = {"429": "///", "over": "///", "client": "xxx", "pipeline": "...", "error": "\\\\\\", "p95": "---"}


def zones(points: Sequence[Point], bounds: Bounds) -> list[tuple[float, float, str]]:
    """Where levels are not feasible: (from, to, cause), neighbours of one cause together. Pure.

    Zones meet half-way, on a logarithmic scale, between two levels. Paced settings do not count: what a level cannot
    do without a pace, it may do with one.
    """
    free = sorted((p for p in points if not p.setting.paced), key=lambda p: p.level)
    if not free:
        return []
    low, high = level_limits([p.level for p in points])
    edges = [low, *(math.sqrt(a.level * b.level) for a, b in itertools.pairwise(free)), high]
    found: list[tuple[float, float, str]] = []
    for n, each in enumerate(free):
        cause = _cause(bounds.broken_by(each))
        if cause is None:
            continue
        if found and found[-1][1:] == (edges[n], cause):
            found[-1] = (found[-1][0], edges[n + 1], cause)
        else:
            found.append((edges[n], edges[n + 1], cause))
    return found


def _cause(broken: str | None) -> str | None:
    """What bound is broken, without how much."""
    return "over the rate found" if broken is not None and "over the rate" in broken else broken


def draw_goodput(axes: Any, points: Sequence[Point], sweep: Sweep, answer: OperatingPoint) -> None:
    """Successful calls and all attempts a second; causes, paces and the answer are written out."""
    free = [p for p in points if not p.setting.paced]
    level_axis(axes, [p.level for p in points])
    top = max([*(p.goodput_high for p in points), *(p.attempt_rate for p in points if p.setting.paced)])
    top = min(1.15 * max(top, max(p.attempt_rate for p in points)), 1.7 * top) or 1.0
    axes.set_ylim(0, top)
    _shade(axes, zones(points, sweep.bounds))
    axes.plot([p.level for p in free], [p.attempt_rate for p in free], color=FAINT, ls=":", lw=1.6)
    axes.plot([p.level for p in free], [p.goodput for p in free], color=INK, lw=1.4)
    for p in points:
        axes.errorbar(place(p), p.goodput, goodput_spread(p), zorder=3, **mark(p, sweep.bounds))
    mark_recommended(axes, answer)
    dress(axes)
    if free:
        last = free[-1]
        beyond = last.attempt_rate > top
        label_right(
            axes,
            [
                (last.level, last.goodput, "successful", INK),
                (
                    last.level,
                    min(last.attempt_rate, top),
                    f"all attempts\n({number(last.attempt_rate)}/s)" if beyond else "all attempts",
                    "#6a6a6a",
                ),
            ],
        )
    paced = {short(p.setting).partition(" ")[2]: p for p in points if p.setting.paced}  # the highest level of each pace
    names = [(place(p), p.goodput, pace, INK) for pace, p in paced.items()]
    label_points(axes, names, [(place(p), y) for p in points for y in (p.goodput_low, p.goodput, p.goodput_high)])
    _name_recommended(axes, answer)


def draw_refusals(axes: Any, points: Sequence[Point], bounds: Bounds) -> None:
    """The 429 share with its interval and its bound."""
    for paced, line in ((False, "-"), (True, "")):
        of = [p for p in points if p.setting.paced is paced]
        spread = [
            [max(0.0, p.share_429 - p.share_429_low) for p in of],
            [max(0.0, p.share_429_high - p.share_429) for p in of],
        ]
        axes.errorbar(
            [place(p) for p in of],
            [p.share_429 for p in of],
            spread,
            color=WARNING,
            ls=line,
            marker="D" if paced else "o",
            ms=4,
            capsize=2,
            lw=1.2,
        )
    axes.axhline(bounds.max_429_ratio, color=WARNING, lw=0.8, ls="--")
    axes.set_ylim(0, max(0.05, 1.15 * max(p.share_429_high if p.refused else p.share_429 for p in points)))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    dress(axes)


def calls_timed(sweep: Sweep, point: Point) -> int:
    """Of how many calls a setting's times are: where windows are pooled, those of the one with the most calls."""
    return max((p.succeeded for p in sweep.points if p.setting == point.setting and p.purpose != "burst"), default=0)


def draw_times(axes: Any, points: Sequence[Point], sweep: Sweep) -> None:
    """Service times and waits in seconds, each line with its name at its end."""
    level_axis(axes, [p.level for p in points])
    axes.set_yscale("log")
    ends = []
    open_loop = any(p.offered_rate is not None for p in points)
    for name, field, color, style in (
        *((("response p95", "response_p95", WARNING, "-."),) if open_loop else ()),
        ("service p95", "service_p95", ACCENT, "--"),
        ("service p50", "service_p50", ACCENT, "-"),
        ("wait p95", "wait_p95", INK, "--"),
        ("wait p50", "wait_p50", INK, "-"),
    ):
        known = [(p, getattr(p, field)) for p in points if (getattr(p, field) or 0.0) > LEAST_SECONDS]
        free = [(p, seconds) for p, seconds in known if not p.setting.paced]
        axes.plot([p.level for p, _ in free], [seconds for _, seconds in free], color=color, ls=style, lw=1.4)
        for p, seconds in known:
            hollow = field.endswith("p95") and calls_timed(sweep, p) < SAMPLES_FOR_P95
            low, high = getattr(p, f"{field}_low", None), getattr(p, f"{field}_high", None)
            spread = None if low is None or high is None else [[max(0.0, seconds - low)], [max(0.0, high - seconds)]]
            axes.errorbar(
                place(p),
                seconds,
                spread,
                marker="D" if p.setting.paced else "o",
                ms=4,
                color=color,
                markerfacecolor="white" if hollow else color,
                capsize=2,
                elinewidth=0.9,
            )
        if known:
            last, seconds = (free or known)[-1]
            ends.append((last.level, seconds, name, color))
    slo_p95 = sweep.bounds.slo_p95
    if slo_p95 is not None:
        axes.axhline(slo_p95, color=WARNING, lw=0.9, ls="--")
        ends.append((axes.get_xlim()[1], slo_p95, "bound on p95", WARNING))
    at_least(axes, 5.0)
    seconds_axis(axes.yaxis)
    dress(axes)
    label_right(axes, ends)


def _shade(axes: Any, found: Sequence[tuple[float, float, str]]) -> None:
    low, high = axes.get_xlim()
    for row, (first, last, cause) in enumerate(reversed(found)):
        hatch = next((hatch for word, hatch in _HATCHES.items() if cause.startswith(word)), "+++")
        axes.axvspan(first, last, facecolor=GROUND, edgecolor="#d2d2d2", hatch=hatch, lw=0, zorder=0)
        on_the_right = first * last > low * high
        axes.text(
            min(last, high) if on_the_right else max(first, low),
            1.015 + 0.06 * row,
            f"{cause} ↓" if on_the_right else f"↓ {cause}",
            transform=axes.get_xaxis_transform(),
            ha="right" if on_the_right else "left",
            fontsize=8.5,
            color="#444444",
        )


def place(point: Point) -> float:
    """Where a point stands on the axis of levels: paced ones a little to the right of those without a pace."""
    return point.level * 1.07 if point.setting.paced else point.level


def mark(point: Point, bounds: Bounds) -> dict[str, Any]:
    """How a point is drawn: see the head of `llmq.tune.plots`."""
    marker = "D" if point.setting.paced else "o"
    style: dict[str, Any] = {"marker": marker, "ms": 6, "color": INK, "capsize": 2.5, "elinewidth": 1}
    if point.limited_by is not None:
        return style | {"marker": "x", "color": FAINT}
    return style if bounds.broken_by(point) is None else style | {"markerfacecolor": "white"}


def goodput_spread(point: Point) -> list[list[float]]:
    """How far the interval of goodput reaches below and above, as matplotlib wants it."""
    return [[max(0.0, point.goodput - point.goodput_low)], [max(0.0, point.goodput_high - point.goodput)]]


def mark_recommended(axes: Any, answer: OperatingPoint) -> None:
    """The blue band."""
    if answer.level is not None:
        axes.axvline(answer.level, color=ACCENT, lw=7, alpha=0.2, zorder=0.5)


def _name_recommended(axes: Any, answer: OperatingPoint) -> None:
    if answer.level is None or answer.setting is None:
        return
    low, high = axes.get_xlim()
    on_the_right = answer.level**2 > low * high
    axes.annotate(
        f"recommended:\n{short(answer.setting)}",
        (answer.level, 0.04),
        xycoords=("data", "axes fraction"),
        xytext=(-9 if on_the_right else 9, 0),
        textcoords="offset points",
        ha="right" if on_the_right else "left",
        color=ACCENT,
        fontweight="bold",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )
