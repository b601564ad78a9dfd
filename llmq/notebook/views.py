"""How a panel's figures look: pure functions from `Figures` to HTML, with no script and no other address."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llmq.cards import card, data_table, fact_table, paragraph
from llmq.pages import html_text
from llmq.words import number

if TYPE_CHECKING:
    from llmq.notebook.rolling import Figures, Percentiles

_WIDTH, _HEIGHT = 120, 22


def figures_html(figures: Figures) -> str:
    """The numbers."""
    tokens = "not told" if figures.tokens_per_minute is None else f"{figures.tokens_per_minute:,}"
    return fact_table(
        [
            ("in flight", f"{figures.in_flight:,} of {figures.limit:,}{_state(figures.state)}"),
            ("waiting", f"{figures.waiting:,}"),
            ("goodput", f"{number(figures.goodput)} successful calls/s"),
            ("429 share", f"{figures.share_429:.1%}{_by_limit(figures.refusals)}"),
            ("wait p50, p95", _times(figures.wait)),
            ("service p50, p95", _times(figures.service)),
            ("tokens a minute", tokens),
        ]
    )


def lines_html(lines: Mapping[str, Sequence[float]]) -> str:
    """A spark line each, of the last minute, with its name and its greatest value."""
    return "".join(
        '<div style="display:inline-block;margin-right:1em">'
        f"{_spark_line(values)}<br><small>{html_text(name)}, at most {number(max(values, default=0))}</small></div>"
        for name, values in lines.items()
    )


def stages_html(figures: Figures) -> str:
    """A row a stage; nothing where calls have no stage."""
    if not figures.stages:
        return ""
    return data_table(
        ("stage", "succeeded", "failed", "429", "service p50", "p95"),
        [
            (s.stage, f"{s.succeeded:,}", f"{s.failed:,}", f"{s.refused:,}", *map(_seconds, s.service))
            for s in figures.stages
        ],
    )


def static_html(figures: Figures | None, note: str) -> str:
    """All of it, to stand in a saved notebook; `figures` is None where there is no queue."""
    if figures is None:
        return card("LLMQueue", paragraph(note))
    parts = figures_html(figures), lines_html(figures.lines), paragraph(figures.why), stages_html(figures)
    return card("LLMQueue", *parts, paragraph(note))


def static_text(figures: Figures | None, note: str) -> str:
    """A line or two, for a terminal."""
    if figures is None:
        return note
    return (
        f"LLMQueue: {figures.in_flight} of {figures.limit} in flight{_state(figures.state)}, "
        f"{figures.waiting} waiting, {number(figures.goodput)} successful calls/s, {figures.share_429:.1%} refused. "
        f"{figures.why}\n{note}"
    )


def _spark_line(values: Sequence[float]) -> str:
    top = max(values, default=0) or 1
    step = _WIDTH / max(1, len(values) - 1)
    points = " ".join(f"{n * step:.1f},{_HEIGHT - 1 - v / top * (_HEIGHT - 2):.1f}" for n, v in enumerate(values))
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img"><polyline points="{points}" '
        'fill="none" stroke="currentColor" stroke-width="1.2"/></svg>'
    )


def _state(state: str) -> str:
    return "" if state == "open" else f", {state}"


def _by_limit(refusals: Mapping[str, float]) -> str:
    return f": {', '.join(f'{limit} {share:.1%}' for limit, share in refusals.items())}" if refusals else ""


def _times(times: Percentiles) -> str:
    return f"{_seconds(times[0])}, {_seconds(times[1])}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} s"
