"""Pages that need nothing else: no script, no other address, all text escaped and without control characters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_STYLE = """\
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 0 0 2rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child, table:first-of-type td { text-align: left; overflow-wrap: anywhere; }
"""


def page(title: str, parts: Iterable[str], style: str = "") -> str:
    """An HTML page of a title (text) and parts (HTML); `style` is CSS beyond what tables need."""
    name = html_text(title)
    body = "\n".join(parts)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{name}</title>
<style>
{_STYLE}{style}</style>
</head>
<body>
<h1>{name}</h1>
{body}
</body>
</html>
"""


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts; the first one of a page has names and values, to be read from left to right."""
    top = f"<tr>{''.join(f'<th>{html_text(cell)}</th>' for cell in head)}</tr>\n" if head else ""
    body = "\n".join(f"<tr>{''.join(f'<td>{html_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table>\n{top}{body}\n</table>"


def html_text(text: str) -> str:
    """Text as HTML."""
    return escape(plain(text))


def plain(text: str) -> str:
    """Text on one line: what cannot be printed is a question mark."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
