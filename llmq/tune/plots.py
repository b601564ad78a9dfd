"""A sweep as one figure. Legible in grey and at the width of a notebook."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator, PercentFormatter

from llmq.tune.point import Point
from llmq.tune.recommend import judged
from llmq.tune.statistics import SAMPLES_FOR_P95

if TYPE_CHECKING:
    from llmq.tune.sweep import Sweep

_LEGEND = (
    "left: hollow where a bound is broken, a cross where client or pipeline was the limit; "
    "right: p95 hollow where it stands on fewer than 72 calls"
)
INK, ACCENT, WARNING, FAINT = "#1a1a1a", "#0b62a4", "#b3261e", "#9a9a9a"


class SweepFigure(Figure):
    """A figure that notebooks show without pyplot."""

    def _repr_png_(self) -> bytes:
        image = io.BytesIO()
        self.savefig(image, format="png", dpi=100)
        return image.getvalue()


def plot_sweep(sweep: Sweep) -> SweepFigure:
    """Goodput with the 429 share below it, and service time and wait, against concurrency; the answer marked.

    Filled marks are feasible levels, grey crosses those where client or pipeline was the limit. A hollow mark on
    a p95 line stands on fewer than 72 calls.
    """
    points = judged(sweep.points)
    figure = SweepFigure(figsize=(9.6, 5.6), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(3, 1))
    goodput = figure.add_subplot(grid[0, 0])
    refusals = figure.add_subplot(grid[1, 0], sharex=goodput)
    times = figure.add_subplot(grid[:, 1])
    answer = sweep.recommend()
    figure.suptitle(textwrap.fill(_title(sweep.title, answer.level), 110), fontsize=10, x=0.01, ha="left")
    figure.supxlabel(_LEGEND, fontsize=8, x=0.01, ha="left")
    if points:
        _draw_goodput(goodput, points, sweep)
        _draw_refusals(refusals, points, sweep.bounds.max_429_ratio)
        _draw_times(times, points, sweep.bounds.slo_p95)
    for axes in (goodput, refusals, times):
        _dress(axes, [p.level for p in points], answer.level)
    goodput.tick_params(labelbottom=False)
    refusals.set_xlabel("calls at once")
    times.set_xlabel("calls at once")
    if answer.level is not None:
        on_the_right = answer.level**2 > points[0].level * points[-1].level
        goodput.annotate(
            f"recommended: {answer.level}",
            (answer.level, 0.03),
            xycoords=("data", "axes fraction"),
            xytext=(-8 if on_the_right else 8, 0),
            textcoords="offset points",
            ha="right" if on_the_right else "left",
            color=ACCENT,
            fontweight="bold",
        )
    return figure


def _draw_goodput(axes: Any, points: Sequence[Point], sweep: Sweep) -> None:
    axes.plot(_levels(points), [p.attempt_rate for p in points], color=FAINT, ls=":", label="all attempts")
    axes.plot(_levels(points), [p.goodput for p in points], color=INK, label="successful")
    for point in points:
        if point.limited_by is not None:
            style = {"marker": "x", "color": FAINT}
        elif sweep.bounds.broken_by(point) is None:
            style = {"marker": "o", "color": INK}
        else:
            style = {"marker": "o", "color": INK, "markerfacecolor": "white"}
        axes.plot(point.level, point.goodput, ls="", ms=6, zorder=3, **style)
    best = max(p.goodput for p in points)
    axes.set_ylim(0, 1.35 * best if best > 0 else 1)
    axes.set_ylabel("calls per second")
    axes.legend(frameon=False, loc="upper left", fontsize=9)


def _draw_refusals(axes: Any, points: Sequence[Point], bound: float) -> None:
    share = [p.share_429 for p in points]
    spread = [
        [max(0.0, p.share_429 - p.share_429_low) for p in points],
        [max(0.0, p.share_429_high - p.share_429) for p in points],
    ]
    axes.errorbar(_levels(points), share, yerr=spread, color=WARNING, marker="o", ms=4, capsize=2, lw=1.2)
    axes.axhline(bound, color=WARNING, lw=0.8, ls="--")
    axes.set_ylim(0, max(0.05, 1.15 * max(p.share_429_high if p.refused else p.share_429 for p in points)))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel("429 share")


def _draw_times(axes: Any, points: Sequence[Point], slo_p95: float | None) -> None:
    lines: tuple[tuple[str, Callable[[Point], float | None], str, str], ...] = (
        ("service p95", lambda p: p.service_p95, ACCENT, "--"),
        ("service p50", lambda p: p.service_p50, ACCENT, "-"),
        ("wait p95", lambda p: p.wait_p95, INK, "--"),
        ("wait p50", lambda p: p.wait_p50, INK, "-"),
    )
    for name, value, color, style in lines:
        # A wait of next to nothing has no place on a logarithmic scale.
        known = [(p, value(p) or 0.0) for p in points if (value(p) or 0.0) > 1e-4]
        if not known:
            continue
        axes.plot([p.level for p, _ in known], [v for _, v in known], color=color, ls=style, lw=1.4, label=name)
        for point, seconds in known:
            hollow = style == "--" and point.succeeded < SAMPLES_FOR_P95
            axes.plot(point.level, seconds, "o", ms=4, color=color, markerfacecolor="white" if hollow else color)
    if slo_p95 is not None:
        axes.axhline(slo_p95, color=WARNING, lw=0.8, ls="--", label="bound on p95")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.yaxis.set_minor_formatter(FormatStrFormatter("%g"))
    axes.set_ylabel("seconds")
    axes.legend(frameon=False, fontsize=9, loc="best")


def _dress(axes: Any, levels: Sequence[int], recommended: int | None) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    ticks = [level for level in levels if level & (level - 1) == 0] or list(levels)
    axes.set_xticks(ticks, [str(level) for level in ticks])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    if recommended is not None:
        axes.axvline(recommended, color=ACCENT, lw=6, alpha=0.18, zorder=0)


def _levels(points: Sequence[Point]) -> list[int]:
    return [p.level for p in points]


def _title(title: str, level: int | None) -> str:
    answer = "no level can be recommended" if level is None else f"{level} calls at once"
    return f"{answer[0].upper()}{answer[1:]}: {title}" if title else answer.capitalize()
