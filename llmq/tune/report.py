"""A sweep as a table, for a terminal or a file."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmq.pages import plain
from llmq.tune.statistics import SAMPLES_FOR_P95
from llmq.words import number

if TYPE_CHECKING:
    from llmq.tune.point import Point, Setting
    from llmq.tune.sweep import Sweep

WIDTH = 120
HEAD = ("at once", "ok/s", "429 (95 %)", "in flight", "service p50 p95", "wait p50 p95", "")
FEW_CALLS = f"* of fewer than {SAMPLES_FOR_P95} calls: a rough figure"


def table(sweep: Sweep) -> Table:
    """A row a measured window: setting, rates a second, shares, median and p95 of times in seconds, and a remark.

    The remark on the last window of a setting is about all of them together.
    """
    title = Text(plain(sweep.title)) if sweep.title else None
    found = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for name in HEAD[:-1]:
        found.add_column(name, justify="right", no_wrap=True)
    found.add_column(HEAD[-1], overflow="fold")
    lines = list(rows(sweep))
    for line in lines:
        found.add_row(*line)
    if any("*" in cell for line in lines for cell in line[4:6]):
        found.caption = Text(FEW_CALLS, justify="left")
        found.caption_justify = "left"
    return found


def text_table(sweep: Sweep) -> str:
    """The table as plain text, at most 120 columns wide."""
    file = io.StringIO()
    Console(file=file, width=WIDTH, color_system=None, force_jupyter=False).print(table(sweep))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines() if line.strip()) + "\n"


def rows(sweep: Sweep) -> Iterator[tuple[str, ...]]:
    """The cells of the table, by `HEAD`: all windows in order of pace, level and time."""
    answer = sweep.recommend().setting
    judged = {point.setting: point for point in sweep.judged()}
    points = sorted(sweep.points, key=_place)
    last = {point.setting: point.order for point in points if point.purpose != "burst"}
    for point in points:
        if point.purpose == "burst":
            remark = "on a burst, not counted"
        elif point.order != last[point.setting] or point.setting not in judged:
            remark = "more of it below"
        elif point.setting == answer:
            remark = "<- recommended"
        else:
            remark = sweep.bounds.broken_by(judged[point.setting]) or ""
        yield (*_cells(point), remark)


def short(setting: Setting) -> str:
    """A setting in few letters: `8`, `8 at 290/min`, `8 at 290/min, 12000 tok/min`."""
    paces = []
    if setting.requests_per_minute is not None:
        paces.append(f"{number(setting.requests_per_minute, 4)}/min")
    if setting.tokens_per_minute is not None:
        paces.append(f"{number(setting.tokens_per_minute, 6)} tok/min")
    return f"{setting.level} at {', '.join(paces)}" if paces else str(setting.level)


def _place(point: Point) -> tuple[float, ...]:
    return (point.requests_per_minute or 0, point.tokens_per_minute or 0, point.level, point.order)


def _cells(point: Point) -> tuple[str, ...]:
    few = "*" if point.succeeded < SAMPLES_FOR_P95 else ""
    p95 = "-" if point.service_p95 is None else f"{_seconds(point.service_p95)}{few}"
    waited = "-" if point.wait_p95 is None else f"{_seconds(point.wait_p95)}{few}"
    return (
        short(point.setting),
        f"{point.goodput:.2f} ±{(point.goodput_high - point.goodput_low) / 2:.2f}",
        f"{point.share_429:.1%} ({100 * point.share_429_low:.1f}-{100 * point.share_429_high:.1f})",
        f"{point.in_flight:.1f}",
        f"{_seconds(point.service_p50)} {p95}",
        f"{_seconds(point.wait_p50)} {waited}",
    )


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value >= 0.01 or value == 0 else number(value, 2)
