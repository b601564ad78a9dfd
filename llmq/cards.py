"""Small tables for a notebook: inline styles only, all text escaped, legible on light and on dark ground.

Whoever has a `_repr_html_` says what it shows; here is how. `statistics_card` stands here and not in the core, which
knows no HTML.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from llmq.pages import html_text

if TYPE_CHECKING:
    from llmq.core import Statistics

_LINE = "border-bottom:1px solid #8884;padding:.2em .75em;background:none;"
_TABLE = '<table style="border-collapse:collapse;margin:.25em 0;font-variant-numeric:tabular-nums">'
MOST_ROWS = 50
"""Rows that a table shows."""

Row = Sequence[str]


def card(title: str, *parts: str) -> str:
    """A title (text) over parts (HTML)."""
    return f"<div><b>{html_text(title)}</b>{''.join(parts)}</div>"


def fact_table(facts: Iterable[tuple[str, str]]) -> str:
    """Names and values (text), a row each."""
    rows = "".join(
        f"<tr>{_cell(name, 'th', 'left', 'font-weight:normal;opacity:.75;')}{_cell(value, 'td', 'left')}</tr>"
        for name, value in facts
    )
    return f"{_TABLE}{rows}</table>"


def data_table(head: Row, rows: Iterable[Row]) -> str:
    """A head and rows (text), the first column to the left, the others to the right; the first `MOST_ROWS` rows."""
    rows = list(rows)
    top = "".join(_cell(name, "th", _side(n)) for n, name in enumerate(head))
    body = "".join(
        f"<tr>{''.join(_cell(value, 'td', _side(n)) for n, value in enumerate(row))}</tr>" for row in rows[:MOST_ROWS]
    )
    more = paragraph(f"and {len(rows) - MOST_ROWS} more") if len(rows) > MOST_ROWS else ""
    return f"{_TABLE}<tr>{top}</tr>{body}</table>{more}"


def code(text: str) -> str:
    """Lines to be copied."""
    return f'<pre style="margin:.25em 0">{escape(text)}</pre>'


def paragraph(text: str) -> str:
    """A line of text."""
    return f'<div style="margin:.25em 0">{html_text(text)}</div>'


def statistics_card(found: Statistics, title: str = "Statistics", more: Iterable[tuple[str, str]] = ()) -> str:
    """What a queue counts, and where it has several, by class and by key; `more` are facts to stand below."""
    facts = [
        ("in flight", f"{found.in_flight:,} of {found.limit:,}{', paused' if found.paused else ''}"),
        ("waiting", f"{found.waiting:,}{_oldest(found.oldest_wait_seconds)}{_at_door(found.at_door)}"),
        ("ended", _counts({outcome.value: n for outcome, n in found.ended.items()})),
        ("turned away", _counts({drop.value: n for drop, n in found.dropped.items()})),
    ]
    if found.held_keys:
        facts.append(("held back", ", ".join(str(key) for key in found.held_keys)))
    tables = [("class", {str(each.name).lower(): counts for each, counts in found.by_class.items()})]
    tables += [(name, {str(key): counts for key, counts in keys.items()}) for name, keys in found.by_key.items()]
    shown = [
        data_table(
            (name, "waiting", "in flight", "ended"),
            [
                (key, f"{c.waiting:,}", f"{c.in_flight:,}", f"{sum(c.ended.values()):,}")
                for key, c in counts.items()
                if c.waiting or c.in_flight or any(c.ended.values())
            ],
        )
        for name, counts in tables
        if sum(bool(c.waiting or c.in_flight or any(c.ended.values())) for c in counts.values()) > 1
    ]
    return card(title, fact_table([*facts, *more]), *shown)


def _oldest(seconds: float | None) -> str:
    return "" if seconds is None else f", the oldest for {seconds:.1f} s"


def _at_door(number: int) -> str:
    return f", and {number:,} at the door of the full queue" if number else ""


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{n:,} {name}" for name, n in counts.items() if n) or "none"


def _side(column: int) -> str:
    return "right" if column else "left"


def _cell(text: str, tag: str, side: str, style: str = "") -> str:
    return f'<{tag} style="{_LINE}text-align:{side};{style}">{html_text(text)}</{tag}>'
