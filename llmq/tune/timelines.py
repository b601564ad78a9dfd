"""Pictures of single calls, from their records: how full the queue was, and who did what when.

Time is in seconds from the first submission; `figure.frame` gives what is drawn.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from llmq.errors import ConfigError
from llmq.pages import plain
from llmq.records import AttemptRecord, Records
from llmq.tune.figures import ACCENT, FAINT, INK, WARNING, SweepFigure, dress, kept_apart, legend_aside, new_figure

MAX_ROWS = 40
"""Services that a Gantt chart has room for."""

_STAGES = (
    ("#0b62a4", ""),
    ("#f2c14e", "///"),
    ("#7fb7d9", "\\\\\\"),
    ("#1a1a1a", ""),
    ("#e07a5f", "xxx"),
    ("#d9d9d9", "..."),
    ("#5e3c78", ""),
    ("#a8d5a2", "---"),
)
_OTHER = ("#ffffff", "++")
_TIMELINE_COLUMNS = ["kind", "at_seconds", "until_seconds", "value", "label"]
_GANTT_COLUMNS = ["service_id", "stage", "attempt", "submitted_seconds", "started_seconds", "ended_seconds", "outcome"]

_NUMBER = re.compile(r"(?<=.)_[0-9]+(?=_|$)")

Span = tuple[float, float]
Limit = int | Sequence[tuple[float, int]]


def plot_timeline(
    records: Records, *, limit: Limit | None = None, events: Iterable[tuple[float, str]] = ()
) -> SweepFigure:
    """(e) Calls in flight and waiting over time, the limit, when a call was refused, and for how long to stay away.

    `limit`: slots, or (at, slots) of each change. `events`: (at, label), such as what a controller did. Both times are
    in seconds on the clock of the records.

    Frame: a row for each thing drawn: kind ("in_flight", "waiting" or "limit": the count `value` from at_seconds to
    until_seconds; "429": a refusal at at_seconds, `label` its limit, and until_seconds the end of its Retry-After;
    "event": `label` at at_seconds).
    Raises ConfigError without records.
    """
    attempts = records.attempts
    if not attempts:
        raise ConfigError("there are no records of attempts to draw")
    zero = min(a.submitted_at for a in attempts)
    end = max(a.ended_at for a in attempts) - zero
    rows = _count_rows("in_flight", [(a.started_at, a.ended_at) for a in attempts if a.started_at is not None], zero)
    rows += _count_rows("waiting", [(a.submitted_at, a.submitted_at + a.wait_seconds) for a in attempts], zero)
    rows += _limit_rows(limit, zero, end)
    rows += [_refusal_row(a, zero) for a in attempts if a.outcome == "rejected"]
    rows += [("event", at - zero, None, None, plain(label)) for at, label in events]
    frame = pd.DataFrame(rows, columns=_TIMELINE_COLUMNS)
    kinds = sorted(set(frame.loc[frame["kind"] == "429", "label"]))
    figure = new_figure(5.2 if kinds else 4.2, "Calls in flight and waiting over time")
    heights = (3.0, 2.0, 0.6 + 0.4 * len(kinds)) if kinds else (3.0, 2.0)
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    flight = figure.add_subplot(grid[0])
    panels = [flight, *(figure.add_subplot(grid[n], sharex=flight) for n in range(1, len(heights)))]
    flight.set_xlim(0, end or 1)
    _draw_count(flight, frame, "in_flight", ACCENT, "in flight")
    _draw_limit(flight, frame)
    _draw_count(panels[1], frame, "waiting", FAINT, "waiting")
    if kinds:
        _draw_refusals(panels[2], frame, kinds)
    _draw_events(panels, frame)
    for panel in panels[:-1]:
        panel.tick_params(labelbottom=False)
    panels[-1].set_xlabel("seconds" + ("   (ticks: a 429; bar: Retry-After)" if kinds else ""), fontsize=9)
    figure.frame = frame
    return figure


def plot_gantt(records: Records) -> SweepFigure:
    """(h) The calls of each service by stage, services in order of their start: at most `MAX_ROWS`, the first ones.

    A thin line is the wait for a slot, a cross a refusal. `features_1`, `features_2` and so on share a colour, as do
    `mapping_1_data` and `mapping_2_data`.

    Frame: service_id, stage, attempt, submitted_seconds, started_seconds, ended_seconds, outcome; a row an attempt
    that had a slot, of the services shown. Raises ConfigError if no record has a service_id.
    """
    ran = [a for a in records.attempts if a.service_id is not None and a.started_at is not None]
    if not ran:
        raise ConfigError("no record of a call has a service_id; give one with LLMTaskMeta(service_id=...)")
    zero = min(a.submitted_at for a in ran)
    first: dict[str, float] = {}
    for a in ran:
        first[a.service_id or ""] = min(first.get(a.service_id or "", a.submitted_at), a.submitted_at)
    services = sorted(first, key=lambda name: (first[name], name))
    shown = services[:MAX_ROWS]
    place = {name: row for row, name in enumerate(shown)}
    drawn = [a for a in ran if a.service_id in place]
    left_out = len(services) - len(shown)
    title = f"Calls by service and stage: {len(shown)} of {len(services)} services"
    figure = new_figure(1.6 + 0.2 * max(5, len(shown)), title + (f", {left_out} left out" if left_out else ""))
    axes = figure.add_subplot()
    stages = list(dict.fromkeys(_family(a.stage) for a in sorted(drawn, key=lambda a: a.started_at or 0.0)))
    for number, stage in enumerate(stages):
        color, hatch = _STAGES[number] if number < len(_STAGES) else _OTHER
        of = [a for a in drawn if _family(a.stage) == stage]
        axes.barh(
            [place[a.service_id or ""] for a in of],
            [a.service_seconds or 0.0 for a in of],
            0.7,
            [(a.started_at or 0.0) - zero for a in of],
            color=color,
            hatch=hatch,
            edgecolor="white" if color == INK else INK,
            lw=0.4,
            label=stage,
        )
    waits = [a for a in drawn if a.wait_seconds > 0]
    axes.hlines(
        [place[a.service_id or ""] for a in waits],
        [a.submitted_at - zero for a in waits],
        [(a.started_at or 0.0) - zero for a in waits],
        color=FAINT,
        lw=1,
        zorder=1,
    )
    refused = [a for a in drawn if a.outcome == "rejected"]
    axes.plot(
        [a.ended_at - zero for a in refused], [place[a.service_id or ""] for a in refused], "x", color=WARNING, ms=5
    )
    axes.set_yticks(range(len(shown)), [_clipped(plain(name)) for name in shown], fontsize=8, parse_math=False)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, max(a.ended_at for a in drawn) - zero or 1)
    axes.set_xlabel("seconds   (thin line: waits for a slot; cross: refused)", fontsize=9)
    dress(axes, "x")
    legend_aside(figure, "stage")
    figure.frame = pd.DataFrame([_gantt_row(a, zero) for a in drawn], columns=_GANTT_COLUMNS)
    return figure


def count_steps(spans: Iterable[Span]) -> list[tuple[float, int]]:
    """How many spans hold at a time, as (from when on, how many), in order of time. Pure.

    >>> count_steps([(0, 2), (1, 2), (5, 5)])
    [(0, 1), (1, 2), (2, 0)]
    """
    changes: dict[float, int] = {}
    for start, end in spans:
        if end > start:
            changes[start] = changes.get(start, 0) + 1
            changes[end] = changes.get(end, 0) - 1
    steps, count = [], 0
    for at in sorted(changes):
        count += changes[at]
        if changes[at]:
            steps.append((at, count))
    return steps


def merged(spans: Iterable[Span]) -> list[Span]:
    """The same time with spans that touch made one. Pure.

    >>> merged([(3, 4), (0, 2), (1, 3)])
    [(0, 4)]
    """
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


Row = tuple[str, float, float | None, float | None, str | None]


def _count_rows(kind: str, spans: Iterable[Span], zero: float) -> list[Row]:
    steps = count_steps(spans)
    ends = [at for at, _ in steps[1:]] + [steps[-1][0]] if steps else []
    return [(kind, at - zero, end - zero, count, None) for (at, count), end in zip(steps, ends, strict=True)]


def _limit_rows(limit: Limit | None, zero: float, end: float) -> list[Row]:
    if limit is None:
        return []
    changes = [(zero, limit)] if isinstance(limit, int) else sorted(limit)
    ends = [at - zero for at, _ in changes[1:]] + [end]
    return [("limit", at - zero, until, slots, None) for (at, slots), until in zip(changes, ends, strict=True)]


def _refusal_row(attempt: AttemptRecord, zero: float) -> Row:
    at = attempt.ended_at - zero
    held = attempt.retry_after_seconds
    return "429", at, None if held is None else at + held, None, attempt.limit_type or "unknown"


def _draw_count(axes: Any, frame: pd.DataFrame, kind: str, color: str, name: str) -> None:
    of = frame[frame["kind"] == kind]
    axes.fill_between(of["at_seconds"], of["value"].astype(float), step="post", color=color, alpha=0.35, lw=0)
    axes.step(of["at_seconds"], of["value"], where="post", color=INK, lw=0.9)
    axes.set_ylim(0, 1.15 * max([1.0, *of["value"]]))
    axes.set_ylabel(name)
    dress(axes)


def _draw_limit(axes: Any, frame: pd.DataFrame) -> None:
    of = frame[frame["kind"] == "limit"]
    if of.empty:
        return
    axes.hlines(of["value"], of["at_seconds"], of["until_seconds"], color=WARNING, lw=1.4, ls="--")
    axes.set_ylim(0, max(axes.get_ylim()[1], 1.15 * float(of["value"].max())))
    last = float(of["value"].iloc[-1])
    axes.annotate(
        "limit", (1.01, last), xycoords=axes.get_yaxis_transform(), color=WARNING, va="center", annotation_clip=False
    )


def _draw_refusals(axes: Any, frame: pd.DataFrame, kinds: Sequence[str]) -> None:
    refusals = frame[frame["kind"] == "429"]
    for row, kind in enumerate(kinds):
        of = refusals[refusals["label"] == kind]
        held = of.dropna(subset=["until_seconds"])
        bars = [
            (start, end - start) for start, end in merged(zip(held["at_seconds"], held["until_seconds"], strict=True))
        ]
        axes.broken_barh(bars, (row, 0.4), facecolor="#ececec", edgecolor=FAINT, hatch="///", lw=0.6)
        axes.plot(of["at_seconds"], [row - 0.2] * len(of), "|", color=WARNING, ms=9, mew=1)
    axes.set_yticks(range(len(kinds)), [f"429 {kind}" for kind in kinds])
    axes.set_ylim(len(kinds) - 0.4, -0.6)
    dress(axes, "x")


def _draw_events(panels: Sequence[Any], frame: pd.DataFrame) -> None:
    of = frame[frame["kind"] == "event"].sort_values("at_seconds")
    low, high = panels[0].get_xlim()
    places = [(float(at) - low) / (high - low) for at in of["at_seconds"]]
    for at, label, place in zip(of["at_seconds"], of["label"], kept_apart(places, 0.025), strict=True):
        for panel in panels:
            panel.axvline(at, color=INK, lw=0.8, ls="-.")
        panels[0].annotate(
            _clipped(label),
            (at, 1.0),
            xycoords=panels[0].get_xaxis_transform(),
            xytext=(place, 1.03),
            textcoords="axes fraction",
            rotation=35,
            fontsize=8,
            parse_math=False,
        )


def _gantt_row(a: AttemptRecord, zero: float) -> tuple[object, ...]:
    started = None if a.started_at is None else a.started_at - zero
    return (a.service_id, a.stage, a.attempt, a.submitted_at - zero, started, a.ended_at - zero, a.outcome)


def _family(stage: str | None) -> str:
    """`features_3` is of `features`, `mapping_3_data` of `mapping_data`."""
    return plain(_NUMBER.sub("", stage or "no stage"))


def _clipped(text: str, most: int = 28) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
