"""A sweep as a table, for a terminal or a file."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from llmq.tune.recommend import judged

if TYPE_CHECKING:
    from llmq.tune.point import Point
    from llmq.tune.sweep import Sweep


def table(sweep: Sweep) -> Table:
    """A row a level: rates a second, median and 95th percentile of times in seconds, what speaks against it."""
    found = Table(title=sweep.title or None, title_justify="left", header_style="bold", box=SIMPLE_HEAD)
    for name in ("at once", "ok/s", "429", "errors", "in flight", "service p50 p95", "wait p50 p95"):
        found.add_column(name, justify="right", no_wrap=True)
    found.add_column("", no_wrap=True)
    recommended = sweep.recommend().level
    counted = {point.order: point for point in judged(sweep.points)}
    for point in sweep.by_level():
        if point.order not in counted:
            remark = "on a burst" if point.purpose == "burst" else "measured again below"
        elif point.level == recommended:
            remark = "<- recommended"
        else:
            remark = sweep.bounds.broken_by(counted[point.order]) or ""
        found.add_row(*_cells(point), remark)
    return found


def text_table(sweep: Sweep) -> str:
    """The table as plain text."""
    file = io.StringIO()
    Console(file=file, width=120, color_system=None).print(table(sweep))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines() if line.strip()) + "\n"


def _cells(point: Point) -> list[str]:
    return [
        str(point.level),
        f"{point.goodput:.2f}",
        f"{point.share_429:.1%}",
        f"{point.error_share:.1%}",
        f"{point.in_flight:.1f}",
        f"{_seconds(point.service_p50)} {_seconds(point.service_p95)}",
        f"{_seconds(point.wait_p50)} {_seconds(point.wait_p95)}",
    ]


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
