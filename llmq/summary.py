"""The report at the end of a run, as values: for a program as JSON, for a terminal as text, for a browser as a page.

What is not known is said to be unknown, never shown as 0. Names come from callers, so text has no control characters
and the page has everything escaped; it has no scripts and asks no other address for anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from llmq.pages import html_table, page, plain
from llmq.words import money

TEXT_ROWS = 5
"""Rows of a table in the text; JSON and page have what there is."""

_WIDEST = 28
"""Letters of a name in the text, but for those of budgets."""
_WIDEST_BUDGET = 80

Unit = Literal["tokens", "usd"]
Row = Sequence[str]


@dataclass(frozen=True)
class Times:
    """Seconds: how many were measured, and from all of them sum and most, from samples the median and p95.

    None where nothing was measured.
    """

    count: int
    sum_seconds: float
    p50_seconds: float | None
    p95_seconds: float | None
    max_seconds: float | None


@dataclass(frozen=True)
class Usage:
    """Tokens as far as providers told them, and their cost in USD as far as models have prices.

    `cost_usd` is None where nothing of it is known; where some tokens have no price or were not told, it is the least.
    """

    input_tokens: int
    output_tokens: int
    attempts_with_unknown_tokens: int
    tokens_without_price: int
    cost_usd: float | None

    @property
    def is_whole(self) -> bool:
        """Whether no tokens and no prices are missing."""
        return not self.tokens_without_price and not self.attempts_with_unknown_tokens


@dataclass(frozen=True)
class StageUse:
    """What the calls of one stage to one model did; `features` is all of `features_1`, `features_2` and so on."""

    stage: str | None
    model_name: str | None
    calls: int
    attempts: int
    refused: int
    wait: Times
    service: Times
    usage: Usage


@dataclass(frozen=True)
class BudgetUse:
    """One budget, or one key of it. `used` and `limit` are in `unit`, `share` is the one by the other (1.0: all)."""

    unit: Unit
    per: Literal["run", "day"]
    by: str | None
    key: str | None
    used: float
    limit: float
    share: float

    def __str__(self) -> str:
        return f"{amount(self.limit, self.unit)} per {self.per}{of_key(self.by, self.key)}"


@dataclass(frozen=True)
class RunSummary:
    """What a run did, used and cost; `str()` is a table.

    `calls` have ended, `attempts` of them have left, `resent` those that a client repeated by itself. `refusals` are
    by the limit that refused: requests, tokens, concurrency, overload, quota, unknown. `wait` is of attempts that
    queued for a slot, `service` of attempts that ran and were not refused. `slowest` are at most 5 stages by p95 of
    service; of a budget by key, `budgets` has at most the 5 keys nearest to their limit. `seconds` is the length of
    the run, where it is known.
    """

    seconds: float | None
    calls: int
    calls_by_outcome: Mapping[str, int]
    attempts: int
    attempts_per_call: float | None
    resent: int
    refusals: Mapping[str, int]
    usage: Usage
    models_without_price: tuple[str, ...]
    wait: Times
    service: Times
    slowest: tuple[StageUse, ...]
    budgets: tuple[BudgetUse, ...]

    def to_json(self) -> str:
        """The fields as a JSON object, by their names here; the names stay, new ones may come.

        Tuples are arrays, `usage`, `wait`, `service` and the entries of `slowest` and `budgets` are objects.
        """
        return json.dumps(asdict(self), indent=2, allow_nan=False)

    def to_html(self) -> str:
        """One page that needs nothing else."""
        parts = [html_table((), self._facts())]
        if self.slowest:
            parts.append(html_table(_STAGE_HEAD, _stage_rows(self.slowest)))
        if self.budgets:
            parts.append(html_table(_BUDGET_HEAD, _budget_rows(self.budgets)))
        return page("LLM calls of a run", parts)

    def __str__(self) -> str:
        lines = [f"{name:<10}{plain(value)}" for name, value in self._facts()]
        if self.slowest:
            lines += ["", *_text_table(_STAGE_HEAD, _stage_rows(self.slowest[:TEXT_ROWS]), _WIDEST)]
        if self.budgets:
            nearest = sorted(self.budgets, key=lambda budget: -budget.share)
            lines += ["", *_text_table(_BUDGET_HEAD, _budget_rows(nearest[:TEXT_ROWS]), _WIDEST_BUDGET)]
            if len(nearest) > TEXT_ROWS:
                lines.append(f"and {len(nearest) - TEXT_ROWS} more, further from their limit")
        return "\n".join(lines)

    def _facts(self) -> list[tuple[str, str]]:
        length = "" if self.seconds is None else f" in {self.seconds:,.1f} s"
        per_call = "" if self.attempts_per_call is None else f", {self.attempts_per_call:.2f} a call"
        resent = f", {self.resent:,} resent by the client itself" if self.resent else ""
        return [
            ("Calls", f"{self.calls:,}{length}{_counts(self.calls_by_outcome)}"),
            ("Attempts", f"{self.attempts:,}{per_call}{resent}"),
            ("Refusals", f"{sum(self.refusals.values()):,}{_counts(self.refusals)}"),
            ("Tokens", f"{self.usage.input_tokens:,} in, {self.usage.output_tokens:,} out{_unknown(self.usage)}"),
            ("Cost", f"{_cost(self.usage)}{_unpriced(self.usage, self.models_without_price)}"),
            ("Wait", _times(self.wait)),
            ("Service", _times(self.service)),
        ]


def amount(value: float, unit: Unit) -> str:
    """An amount with its unit.

    >>> amount(2_000_000, "tokens"), amount(0.5, "usd")
    ('2,000,000 tokens', '0.50 USD')
    """
    return f"{value:,.0f} tokens" if unit == "tokens" else f"{money(value)} USD"


def of_key(by: str | None, key: str | None) -> str:
    """Whose budget it is: nothing for all together."""
    if by is None:
        return ""
    return f" for calls without {by}" if key is None else f" for {by} {plain(key)}"


def _counts(counts: Mapping[str, int]) -> str:
    return ": " + ", ".join(f"{name} {count:,}" for name, count in counts.items()) if counts else ""


def _unknown(usage: Usage) -> str:
    unknown = usage.attempts_with_unknown_tokens
    return f", and unknown of {unknown:,} attempt{'s' if unknown > 1 else ''} that did not tell" if unknown else ""


def _cost(usage: Usage) -> str:
    if usage.cost_usd is None:
        return "unknown"
    return f"{'' if usage.is_whole else 'at least '}{money(usage.cost_usd)} USD"


def _unpriced(usage: Usage, models: Sequence[str]) -> str:
    if not usage.tokens_without_price:
        return ""
    named = ", ".join(models[:3]) + (f" and {len(models) - 3} more" if len(models) > 3 else "")
    return f"; no price for {usage.tokens_without_price:,} tokens of {named}: set llm_prices"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _times(times: Times) -> str:
    if not times.count:
        return "nothing measured"
    return (
        f"p50 {_seconds(times.p50_seconds)} s, p95 {_seconds(times.p95_seconds)} s, "
        f"max {_seconds(times.max_seconds)} s, of {times.count:,}"
    )


_STAGE_HEAD = (
    "slowest stages",
    "model",
    "calls",
    "attempts",
    "p50 s",
    "p95 s",
    "refused",
    "wait p95 s",
    "tokens",
    "cost",
)
_BUDGET_HEAD = ("budget", "used", "share")


def _stage_rows(stages: Iterable[StageUse]) -> list[Row]:
    return [
        (
            stage.stage or "-",
            stage.model_name or "-",
            f"{stage.calls:,}",
            f"{stage.attempts:,}",
            _seconds(stage.service.p50_seconds),
            _seconds(stage.service.p95_seconds),
            f"{stage.refused:,}",
            _seconds(stage.wait.p95_seconds),
            _tokens(stage.usage),
            _cost(stage.usage),
        )
        for stage in stages
    ]


def _tokens(usage: Usage) -> str:
    told = usage.input_tokens + usage.output_tokens
    if not usage.attempts_with_unknown_tokens:
        return f"{told:,}"
    return f"at least {told:,}" if told else "unknown"


def _budget_rows(budgets: Iterable[BudgetUse]) -> list[Row]:
    return [(str(budget), amount(budget.used, budget.unit), f"{budget.share:.0%}") for budget in budgets]


def _clipped(text: str, widest: int) -> str:
    return text if len(text) <= widest else text[: widest - 1] + "…"


def _text_table(head: Row, rows: Iterable[Row], widest: int) -> list[str]:
    cells = [[_clipped(plain(cell), widest) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if n == 0 else cell.rjust(width) for n, (cell, width) in enumerate(aligned)
        ).rstrip()
        for aligned in (list(zip(row, widths, strict=True)) for row in cells)
    ]
