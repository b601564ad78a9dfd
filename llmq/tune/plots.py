"""Pictures of a sweep. Legible in grey and at the width of a notebook; each gives its data as `figure.frame`.

How to read the marks, the same in all of them
- Filled: within the bounds. Hollow: a bound is broken. A grey cross: this client or the pipeline was the limit.
- Round: as many calls as there are slots. A diamond: starts were paced; the pace is written next to it.
- A bar through a mark, or a band about a line, is the 95 % interval. The blue band is what is recommended.
- Grey hatched ground: levels that are not feasible, with the cause above.

Every frame of a sweep has a row for each setting, in order of pace and level, and the columns `setting` (text),
`level`, `requests_per_minute` and `tokens_per_minute` (the pace, missing without one), `broken_by` (text, missing where
it keeps the bounds) and `recommended` (bool), besides those that each function names; they are fields of
`llmq.tune.point.Point`, with its units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.ticker import PercentFormatter

from llmq.errors import ConfigError
from llmq.pages import plain
from llmq.tune import point as points_module
from llmq.tune.drawing import (
    LEAST_SECONDS,
    calls_timed,
    draw_goodput,
    draw_refusals,
    draw_times,
    goodput_spread,
    mark,
    mark_recommended,
)
from llmq.tune.figures import (
    ACCENT,
    FAINT,
    INK,
    WARNING,
    SweepFigure,
    dress,
    kept_apart,
    label_points,
    legend_aside,
    new_figure,
    seconds_axis,
)
from llmq.tune.report import short
from llmq.tune.statistics import SAMPLES_FOR_P95
from llmq.words import number

if TYPE_CHECKING:
    from llmq.tune.compare import Change
    from llmq.tune.point import Point
    from llmq.tune.recommend import OperatingPoint
    from llmq.tune.standing import Bounds
    from llmq.tune.sweep import Sweep

MARKS = (
    "filled: within the bounds; hollow: a bound is broken; grey cross: client or pipeline was the limit; diamond: paced"
)
_SETTING = ("level", "requests_per_minute", "tokens_per_minute")
_GOODPUT = ("goodput", "goodput_low", "goodput_high", "attempt_rate")
_REFUSALS = ("share_429", "share_429_low", "share_429_high")
_SERVICE = ("service_p50", "service_p50_low", "service_p50_high", "service_p95", "service_p95_low", "service_p95_high")
_WAIT = ("wait_p50", "wait_p95")

OUTCOMES = {
    "ok": ("#5b9bd5", ""),
    "ok after retry": ("#c6dcf1", "//"),
    "429 requests": ("#b3261e", ""),
    "429 tokens": ("#e07a5f", "\\\\"),
    "429 concurrency": ("#f2c14e", "xx"),
    "429 overload": ("#f6e3b4", ".."),
    "429 unknown": ("#efefef", "++"),
    "5xx": ("#1a1a1a", ""),
    "timeout": ("#7a7a7a", "--"),
    "cancelled": ("#ffffff", "||"),
    "truncated": ("#b9a3d0", "oo"),
    "error": ("#5e3c78", ""),
}
"""Colour and hatch of each outcome, in the order in which they are stacked."""


def plot_sweep(sweep: Sweep) -> SweepFigure:
    """Goodput with the 429 share below it, and service time and wait, against the level; the answer marked.

    Frame: goodput, goodput_low, goodput_high, attempt_rate, share_429, share_429_low, share_429_high, service_p50,
    service_p95 with `_low` and `_high`, wait_p50, wait_p95, succeeded.
    """
    points, answer = sweep.judged(), sweep.recommend()
    figure = new_figure(5.8, _title(sweep.title, answer))
    grid = figure.add_gridspec(2, 2, height_ratios=(3, 1), width_ratios=(1.1, 1))
    goodput = figure.add_subplot(grid[0, 0])
    refusals = figure.add_subplot(grid[1, 0], sharex=goodput)
    times = figure.add_subplot(grid[:, 1])
    figure.supxlabel(f"{MARKS};\np95 hollow: of fewer than {SAMPLES_FOR_P95} calls", fontsize=8, x=0.01, ha="left")
    goodput.set_ylabel("calls per second")
    refusals.set_ylabel("429 share")
    times.set_ylabel("seconds")
    if points:
        draw_goodput(goodput, points, sweep, answer)
        draw_refusals(refusals, points, sweep.bounds)
        draw_times(times, points, sweep)
        mark_recommended(times, answer)
        mark_recommended(refusals, answer)
    goodput.tick_params(labelbottom=False)
    refusals.set_xlabel("calls at once")
    times.set_xlabel("calls at once")
    figure.frame = _frame(sweep, points, answer, *_GOODPUT, *_REFUSALS, *_SERVICE, *_WAIT, "succeeded")
    return figure


def plot_goodput(sweep: Sweep) -> SweepFigure:
    """(a) Successful calls a second and all attempts against the level, with intervals, and what is not feasible.

    Frame: goodput, goodput_low, goodput_high, attempt_rate, share_429, share_429_low, share_429_high, succeeded.
    """
    points, answer = sweep.judged(), sweep.recommend()
    figure = new_figure(4.8, _title(sweep.title, answer))
    axes = figure.add_subplot()
    axes.set_xlabel(f"calls at once\n{MARKS}", fontsize=9)
    axes.set_ylabel("calls per second")
    if points:
        draw_goodput(axes, points, sweep, answer)
    figure.frame = _frame(sweep, points, answer, *_GOODPUT, *_REFUSALS, "succeeded")
    return figure


def plot_times(sweep: Sweep) -> SweepFigure:
    """(b) Median and 95th percentile of service time and wait against the level; seconds, on a logarithmic scale.

    Frame: service_p50 and service_p95 with `_low` and `_high`, wait_p50, wait_p95, succeeded.
    """
    points, answer = sweep.judged(), sweep.recommend()
    figure = new_figure(4.8, "Service time (slot to end) and wait (submit to slot)")
    axes = figure.add_subplot()
    axes.set_xlabel(f"calls at once\nhollow p95: of fewer than {SAMPLES_FOR_P95} calls; diamond: paced", fontsize=9)
    axes.set_ylabel("seconds")
    if points:
        draw_times(axes, points, sweep)
        mark_recommended(axes, answer)
    figure.frame = _frame(sweep, points, answer, *_SERVICE, *_WAIT, "succeeded")
    return figure


def plot_outcomes(sweep: Sweep) -> SweepFigure:
    """(c) What became of the attempts, as shares: a bar a setting.

    Frame: attempts (count) and, for each outcome that occurs, its share of them (0 to 1) in a column of its name:
    ok, ok after retry, 429 and the limit, 5xx, timeout, cancelled, truncated, error.
    """
    points, answer = sweep.judged(), sweep.recommend()
    seen = {name for p in points for name, count in p.outcomes.items() if count}
    names = [name for name in OUTCOMES if name in seen] + sorted(seen - set(OUTCOMES))
    frame = _frame(sweep, points, answer, "attempts")
    for name in names:
        frame[name] = [p.outcomes.get(name, 0) / max(1, sum(p.outcomes.values())) for p in points]
    figure = new_figure(1.6 + 0.3 * max(4, len(points)), "What became of the attempts")
    axes = figure.add_subplot()
    rows = range(len(points))
    left = [0.0] * len(points)
    for name in names:
        color, hatch = OUTCOMES.get(name, ("#dddddd", "**"))
        shares = list(frame[name])
        axes.barh(rows, shares, 0.72, left, color=color, hatch=hatch, edgecolor=INK, lw=0.5, label=name)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    axes.set_yticks(rows, [f"{short(p.setting)}{' *' if p.setting == answer.setting else ''}" for p in points])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel("calls at once")
    axes.set_xlabel("share of the attempts" + ("" if answer.setting is None else "   (*: recommended)"))
    dress(axes, "x")
    if names:
        legend_aside(figure)
    figure.frame = frame
    return figure


def plot_tradeoff(sweep: Sweep) -> SweepFigure:
    """(d) Goodput against the p95 of the service time, each setting by its level: up and to the left is better.

    Of an open loop it is the response time, from the intended start. Settings without a successful call have no place.
    Frame: goodput, goodput_low, goodput_high, service_p95 with `_low` and `_high`, response_p95, succeeded.
    """
    answer = sweep.recommend()
    judged = sweep.judged()
    name = "response" if any(p.offered_rate is not None for p in judged) else "service"
    places = [(p, seconds) for p in judged if (seconds := getattr(p, f"{name}_p95"))]
    figure = new_figure(4.8, "What speed costs in latency: up and to the left is better")
    axes = figure.add_subplot()
    axes.set_xlabel(f"{name} time p95, seconds\nnumbers: calls at once; {MARKS}", fontsize=9)
    axes.set_ylabel("successful calls per second")
    dress(axes, "both")
    if places:
        _draw_tradeoff(axes, places, sweep.bounds, answer)
    columns = (*_GOODPUT[:3], *_SERVICE[3:], "response_p95", "succeeded")
    figure.frame = _frame(sweep, [p for p, _ in places], answer, *columns)
    return figure


def _draw_tradeoff(axes: Any, places: Sequence[tuple[Point, float]], bounds: Bounds, answer: OperatingPoint) -> None:
    times = [seconds for _, seconds in places]
    if max(times) > 8 * min(times):
        axes.set_xscale("log")
    else:  # else the noise of equal times would fill the picture
        axes.set_xlim(0, 1.1 * max(*times, *(p.service_p95_high or 0.0 for p, _ in places)))
    free = [(p, seconds) for p, seconds in places if not p.setting.paced]
    axes.plot([seconds for _, seconds in free], [p.goodput for p, _ in free], color=FAINT, lw=1, zorder=1)
    for p, seconds in places:
        if p.service_p95_low is not None and p.service_p95_high is not None and seconds == p.service_p95:
            axes.hlines(p.goodput, p.service_p95_low, p.service_p95_high, color="#bdbdbd", lw=1.2, zorder=1)
        axes.errorbar(seconds, p.goodput, goodput_spread(p), zorder=3, **mark(p, bounds))
    axes.set_ylim(0, 1.2 * max(p.goodput_high for p, _ in places) or 1)
    if bounds.slo_p95 is not None:
        axes.axvline(bounds.slo_p95, color=WARNING, lw=0.9, ls="--")
        top = axes.get_xaxis_transform()
        axes.text(bounds.slo_p95, 1.01, "bound", color=WARNING, ha="center", transform=top)
    if axes.get_xscale() == "log":
        seconds_axis(axes.xaxis)
    labels = []
    for p, seconds in sorted(places, key=lambda place: place[0].setting != answer.setting):
        ours = p.setting == answer.setting
        name = short(p.setting) + (" (recommended)" if ours else "")
        labels.append((seconds, p.goodput, name, ACCENT if ours else INK))
    label_points(axes, labels, [(seconds, end) for p, seconds in places for end in (p.goodput_low, p.goodput_high)])


def plot_percentiles(sweep: Sweep, level: int | None = None) -> SweepFigure:
    """(f) Percentiles of the response time, from the intended start, and of the service time, at one setting.

    `level` None: the recommended setting, else the one with the most calls; a level: its setting without a pace, if
    it was measured so. The axis gives every further nine the same room (as HdrHistogram does). A line is dotted where
    there are too few calls for a 95 % interval: a quantile q needs q^n <= 0.025, so 72 for p95, 368 for p99.

    Frame: quantile (0 to 1), service_seconds, response_seconds, enough_calls (bool).
    Raises ConfigError where nothing of that level is known.
    """
    chosen = _chosen(sweep, level)
    quantiles = [q for q in points_module.QUANTILES if q < 1]
    calls = calls_timed(sweep, chosen)
    enough = [max(q, 1 - q) ** calls <= 0.025 for q in quantiles]
    drawn = sum(q <= 1 - 1 / max(1, calls) for q in quantiles)
    sure = max((n for n in range(drawn) if enough[n]), default=0)
    figure = new_figure(4.4, f"How long calls take at {chosen.setting}: {calls} calls")
    axes = figure.add_subplot()
    nines = [-math.log10(1 - q) for q in quantiles]
    lines = (
        ("response,\nfrom the intended start", chosen.response_quantiles, INK, "-"),
        ("service time,\nslot to end", chosen.service_quantiles, ACCENT, "--"),
    )
    known = [(name, seconds[:drawn], color, style) for name, seconds, color, style in lines if seconds[:drawn]]
    for _, seconds, color, style in known:
        axes.plot(nines[: sure + 1], seconds[: sure + 1], color=color, ls=style, lw=1.6)
        axes.plot(nines[sure:drawn], seconds[sure:], color=color, ls=":", lw=1.4)
    every = [second for _, seconds, *_ in known for second in seconds]
    if every and min(every) > LEAST_SECONDS and max(every) > 10 * min(every):
        axes.set_yscale("log")
        seconds_axis(axes.yaxis)
    else:
        axes.set_ylim(bottom=0)
    ticks = {0.0: "min", 0.5: "p50", 0.9: "p90", 0.95: "p95", 0.99: "p99", 0.999: "p99.9"}
    axes.set_xticks([-math.log10(1 - q) for q in ticks], list(ticks.values()))
    axes.set_xlim(0, max(2.0, nines[drawn - 1]) if drawn else 2.0)
    axes.set_xlabel("percentile of the successful calls   (dotted: too few calls to be sure)", fontsize=9)
    axes.set_ylabel("seconds")
    dress(axes, "both")
    _label_ends(axes, [(nines[drawn - 1], seconds[-1], name, color) for name, seconds, color, _ in known])
    service, response = chosen.service_quantiles, chosen.response_quantiles
    figure.frame = pd.DataFrame(
        {
            "quantile": quantiles,
            "service_seconds": list(service[: len(quantiles)]) or None,
            "response_seconds": list(response[: len(quantiles)]) or None,
            "enough_calls": enough,
        }
    )
    return figure


_VERDICTS = {"better": (ACCENT, "^"), "worse": (WARNING, "v"), "undecided": (FAINT, "o")}


def plot_before_after(changes: Sequence[Change], title: str = "Before and after") -> SweepFigure:
    """(g) Relative changes: hollow is before (0 %), filled is after, its colour and shape the verdict.

    A change from 0, or of what is not known (NaN), has no relative size and is given in words only.

    Frame: the fields of `Change`, with `change` relative, and missing from 0.
    """
    if not changes:
        raise ConfigError("there is nothing to compare: give at least one change")
    frame = pd.DataFrame([asdict(row) for row in changes])
    relative = [row.after / row.before - 1 if row.before else None for row in changes]
    relative = [change if change is not None and math.isfinite(change) else None for change in relative]
    frame["change"] = pd.Series(relative, dtype=float)
    figure = new_figure(1.4 + 0.42 * max(2, len(changes)), title)
    axes = figure.add_subplot()
    axes.axvline(0, color=FAINT, lw=1)
    for row, (each, change) in enumerate(zip(changes, relative, strict=True)):
        color, marker = _VERDICTS[each.verdict]
        size = "" if change is None else f"  ({change:+.0%}, {each.verdict})"
        axes.annotate(
            f"{_known(each.before)} → {_known(each.after)} {plain(each.unit)}{size}",
            (1.02, row),
            xycoords=axes.get_yaxis_transform(),
            va="center",
            fontsize=9,
            color=INK if each.verdict == "undecided" else color,
            parse_math=False,
            annotation_clip=False,
        )
        if change is None:
            continue
        if each.low is not None and each.high is not None:
            axes.plot([each.low, each.high], [row, row], color=color, lw=5, alpha=0.3, solid_capstyle="butt")
        axes.annotate("", (change, row), (0, row), arrowprops={"arrowstyle": "-", "color": INK, "lw": 1})
        axes.plot(0, row, "o", ms=6, color=INK, markerfacecolor="white", zorder=3)
        axes.plot(change, row, marker, ms=7, color=color, zorder=3)
    axes.set_yticks(range(len(changes)), [plain(each.what) for each in changes], parse_math=False)
    axes.set_ylim(len(changes) - 0.5, -0.5)
    axes.margins(x=0.12)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("change, interval 95 %   (hollow: before, filled: after; up: better, down: worse)", fontsize=9)
    dress(axes, "x")
    figure.frame = frame
    return figure


def _known(value: float) -> str:
    return number(value, 4) if math.isfinite(value) else "-"


def _label_ends(axes: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """As `label_right`, for names of two lines."""
    to_fraction = axes.transAxes.inverted().transform
    middles = [float(to_fraction(axes.transData.transform((x, y)))[1]) for x, y, *_ in ends]
    for (_, _, text, color), middle in zip(ends, kept_apart(middles, 0.16), strict=True):
        axes.text(1.02, middle, text, color=color, fontsize=9, va="center", transform=axes.transAxes)


def _chosen(sweep: Sweep, level: int | None) -> Point:
    known = [p for p in sweep.judged() if p.service_quantiles or p.response_quantiles]
    if level is not None:
        of_level = [p for p in known if p.level == level]
        if not of_level:
            have = ", ".join(str(p.level) for p in known) or "none"
            raise ConfigError(f"no times are known of level {level}; they are of: {have}")
        return of_level[0]
    if not known:
        raise ConfigError("no times are known: no call succeeded at any level")
    ours = sweep.recommend().setting
    return next((p for p in known if p.setting == ours), max(known, key=lambda p: p.succeeded))


def _frame(sweep: Sweep, points: Sequence[Point], answer: OperatingPoint, *columns: str) -> pd.DataFrame:
    names = (*_SETTING, *columns)
    rows = [
        {
            "setting": str(p.setting),
            **{name: getattr(p, name) for name in names},
            "broken_by": sweep.bounds.broken_by(p),
            "recommended": p.setting == answer.setting,
        }
        for p in points
    ]
    return pd.DataFrame(rows, columns=["setting", *names, "broken_by", "recommended"])


def _title(title: str, answer: OperatingPoint) -> str:
    setting = answer.setting
    words = "No level can be recommended"
    if setting is not None:
        words = f"{setting.level} calls at once{f', at {setting.pace}' if setting.paced else ''}"
    return f"{words}: {title}" if title else words
