"""What the explorer shows of measured points, as HTML that is quickly made and needs no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from llmq.pages import html_table
from llmq.tune.point import Point
from llmq.tune.report import short
from llmq.tune.standing import Bounds
from llmq.words import number

_WIDTH, _HEIGHT, _LEFT, _BASE = 420, 170, 46, 140
_OK, _BROKEN = "#2b6cb0", "#b3261e"


def points_svg(points: Sequence[Point], bounds: Bounds) -> str:
    """Goodput against calls at once (log scale), a mark a window with its 95 % interval; hollow: a bound is broken."""
    if not points:
        return ""
    levels = sorted({point.level for point in points})
    low, high = math.log2(levels[0]), math.log2(levels[-1])
    top = max(point.goodput_high for point in points) or 1.0

    def x(level: int) -> float:
        share = 0.5 if high == low else (math.log2(level) - low) / (high - low)
        return _LEFT + 10 + share * (_WIDTH - _LEFT - 30)

    def y(goodput: float) -> float:
        return _BASE - goodput / top * (_BASE - 14)

    parts = [
        f'<line x1="{_LEFT}" y1="{_BASE}" x2="{_WIDTH}" y2="{_BASE}" stroke="currentColor" opacity=".4"/>',
        f'<text x="{_LEFT - 4}" y="18" text-anchor="end">{number(top)}</text>',
        f'<text x="{_LEFT - 4}" y="{_BASE}" text-anchor="end">0</text>',
        f'<text x="{_LEFT}" y="10">successful calls/s</text>',
        f'<text x="{_WIDTH}" y="{_HEIGHT - 2}" text-anchor="end">calls at once</text>',
    ]
    parts += [f'<text x="{x(n):.1f}" y="{_BASE + 14}" text-anchor="middle">{n}</text>' for n in levels]
    for point in points:
        broken = bounds.broken_by(point) is not None
        colour, at = _BROKEN if broken else _OK, x(point.level)
        parts.append(
            f'<line x1="{at:.1f}" y1="{y(point.goodput_low):.1f}" x2="{at:.1f}" y2="{y(point.goodput_high):.1f}" '
            f'stroke="{colour}"/><circle cx="{at:.1f}" cy="{y(point.goodput):.1f}" r="4" stroke="{colour}" '
            f'fill="{"none" if broken else colour}"/>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
        f'font-size="11" fill="currentColor" role="img"><title>goodput by level</title>{"".join(parts)}</svg>'
    )


def figures_table(point: Point, bounds: Bounds) -> str:
    """What was measured at one setting."""
    few = f"{point.succeeded} of {point.attempts} attempts succeeded in {number(point.window_seconds)} s"
    lines = [
        ("setting", f"{short(point.setting)} calls at once"),
        ("successful calls/s", f"{point.goodput:.2f} ({point.goodput_low:.2f} to {point.goodput_high:.2f})"),
        ("429 share", f"{point.share_429:.1%} ({point.share_429_low:.1%} to {point.share_429_high:.1%})"),
        ("service p50, p95", f"{_seconds(point.service_p50)}, {_seconds(point.service_p95)}"),
        ("wait p50, p95", f"{_seconds(point.wait_p50)}, {_seconds(point.wait_p95)}"),
        ("in flight", f"{point.in_flight:.1f} on average"),
        ("of", few),
        ("bounds", bounds.broken_by(point) or "kept"),
    ]
    return html_table((), lines)


def as_html(thing: object) -> str:
    """Its own card, or its text."""
    card = getattr(thing, "_repr_html_", None)
    return str(card()) if callable(card) else f"<pre>{escape(str(thing))}</pre>"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{number(value)} s"
