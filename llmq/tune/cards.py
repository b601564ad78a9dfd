"""What a notebook shows of a sweep and of an operating point."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmq.cards import card, code, data_table, fact_table, paragraph
from llmq.tune.report import FEW_CALLS, HEAD, rows
from llmq.words import number

if TYPE_CHECKING:
    from llmq.tune.recommend import OperatingPoint
    from llmq.tune.sweep import Sweep


def sweep_card(sweep: Sweep) -> str:
    """The table that `str(sweep)` has, and the answer in its first line."""
    if not sweep.points:
        return card(sweep.title or "Sweep", paragraph("Nothing has been measured yet."))
    lines = list(rows(sweep))
    few = paragraph(FEW_CALLS) if any("*" in cell for line in lines for cell in line[4:6]) else ""
    stopped = "" if sweep.stopped is None else paragraph(f"The sweep {sweep.stopped}.")
    return card(sweep.title or "Sweep", data_table(HEAD, lines), few, stopped, paragraph(_answer(sweep.recommend())))


def point_card(point: OperatingPoint) -> str:
    """The recommendation with its reason, and the settings that put it in force."""
    facts = [
        ("goodput", _between(point.goodput, point.goodput_low, point.goodput_high, "calls/s")),
        ("429 share", "" if point.share_429 is None else f"{point.share_429:.1%}{_at_most(point.share_429_high)}"),
        ("what binds", point.binds),
        ("95 % interval of the level", _levels(point.level_low, point.level_high)),
        ("confidence", "" if point.confidence is None else f"{point.confidence:.0%}"),
    ]
    return card(
        _answer(point),
        paragraph(point.reason),
        fact_table((name, value) for name, value in facts if value) if point.level is not None else "",
        *map(paragraph, (*filter(None, [point.waste]), *point.notes, *point.next_steps)),
        paragraph("To put it in force: sweep.apply(), or in config/app.yaml") + code(point.yaml) if point.yaml else "",
    )


def _answer(point: OperatingPoint) -> str:
    return str(point).partition("\n")[0]


def _between(value: float | None, low: float | None, high: float | None, unit: str) -> str:
    if value is None:
        return ""
    interval = "" if low is None or high is None else f" (95 % interval {number(low)} to {number(high)})"
    return f"{number(value)} {unit}{interval}"


def _at_most(share: float | None) -> str:
    return "" if share is None else f" (at most {share:.1%})"


def _levels(low: int | None, high: int | None) -> str:
    return "" if low is None or high is None else f"{low} to {high} calls at once"
