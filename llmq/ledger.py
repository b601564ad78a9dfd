"""What calls used, what that cost, and how much may be used.

Sums are exact in any order and from any thread: tokens are whole numbers, and money is kept in whole picodollars
(1e-12 USD). A model without a price costs "unknown", never 0, so under a budget of cost it may not be called.

A budget counts what has ended. Calls in flight when it is used up are not stopped, so it is overrun by what they use.
A *run* is the life of one `Ledger`; a *day* is one of UTC by the wall clock, and what an attempt used belongs to the
day on which it is added. Labels are not in records, so budgets go by fields only; by stage, `features_3` counts as
`features`, here as in telemetry.

Memory is bounded but for the keys of budgets: past `MAX_VALUES` pairs of stage and model further ones are `_other`.
Percentiles are from samples: of each kind of times every one up to `SAMPLES`, then a uniform sample (Vitter's algorithm
R, 1985) whose random numbers are seeded, so equal records in equal order give equal figures.

The file of day totals is that of one process at a time: of two that write it at once, the later write stands.
"""

from __future__ import annotations

import heapq
import json
import math
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import quantiles
from typing import Literal
from weakref import finalize

from llmq.core import LLMTaskMeta
from llmq.core.jobs import KEYS
from llmq.errors import InputError
from llmq.records import AttemptRecord, OperationRecord
from llmq.summary import BudgetUse, RunSummary, StageUse, Times, Unit, Usage, amount, of_key
from llmq.telemetry import MAX_VALUES, stage_attributes

ALERT_PERCENTS = (80, 100)
"""Of a budget: when to tell."""

SAMPLES = 1024
"""Of one kind of times of one stage and model."""

SAVE_SECONDS = 5.0
"""The least time between two writes of the day totals, but for `close`."""

LARGEST = 5
"""Stages, and keys of one budget, that a summary has."""

_OTHER = "_other"
_NO_MODEL = "(no model named)"
_PICODOLLARS = 10**12
_PICODOLLARS_PER_TOKEN = 10**6
"""At one USD per million tokens."""
_DAY_SECONDS = 86400
_FORMAT = "llmq day totals 1"


@dataclass(frozen=True)
class Price:
    """USD per million tokens of prompts (`input`) and of answers (`output`), to six decimals. Raises ValueError.

    >>> Price(2.5, 10).cost_usd(1_000_000, 200_000)
    4.5
    """

    input: float
    output: float

    def __post_init__(self) -> None:
        for name, value in (("input", self.input), ("output", self.output)):
            if not _is_number(value) or not (value == 0 or 1e-6 <= value < math.inf):
                raise ValueError(f"a price is in USD per million tokens, 0 or at least 0.000001; got {name}={value!r}")

    def cost_usd(self, input_tokens: int, output_tokens: int) -> float:
        """What so many tokens cost, in USD."""
        return self.picodollars(input_tokens, output_tokens) / _PICODOLLARS

    def picodollars(self, input_tokens: int, output_tokens: int) -> int:
        """The same in 1e-12 USD, exactly."""
        per_input, per_output = (round(price * _PICODOLLARS_PER_TOKEN) for price in (self.input, self.output))
        return input_tokens * per_input + output_tokens * per_output


@dataclass(frozen=True)
class Budget:
    """How much may be used `per` run or UTC day: `tokens` (prompts and answers), or `cost` in USD.

    `by` None: by all calls together. Else a field (`model_name`, `service_id`, `stage`, `request_id`): each value has
    the whole budget, or its own by `overrides`; calls without that field share one. The least is a
    token or 0.000001 USD. Raises ValueError.

    >>> Budget(cost=5, by="service_id", overrides={"trial": 0.5}).limit_of("trial")
    0.5
    """

    tokens: float | None = None
    cost: float | None = None
    per: Literal["run", "day"] = "run"
    by: str | None = None
    overrides: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.cost is None):
            raise ValueError(
                f"a budget is either of tokens or of cost (USD), got tokens={self.tokens!r} and cost={self.cost!r}"
            )
        if self.per not in ("run", "day"):
            raise ValueError(f"a budget is per run or day; got per={self.per!r}")
        if self.by is not None and self.by not in KEYS:
            raise ValueError(f"a budget goes by {', '.join(KEYS)}, not by labels; got by={self.by!r}")
        if self.overrides and self.by is None:
            raise ValueError("a budget of all calls together has no overrides; say by what they go")
        for key, value in (("", self.limit_of(None)), *self.overrides.items()):
            whose = f" of {self.by} {key}" if key else ""
            if not _is_number(value) or not self._least <= value < math.inf:
                least = "0.000001 USD" if self.tokens is None else "1 token"
                raise ValueError(f"a budget{whose} must be at least {least}, got {value!r}")
            if self.by == "stage" and key and _label(key) != key:
                raise ValueError(f"a budget by stage goes by {_label(key)}, which {key} belongs to")

    @property
    def unit(self) -> Unit:
        """What it is of."""
        return "usd" if self.tokens is None else "tokens"

    @property
    def _least(self) -> float:
        return 1e-6 if self.tokens is None else 1

    def limit_of(self, key: str | None) -> float:
        """The budget of one key, in tokens or USD."""
        everybody = self.cost if self.tokens is None else self.tokens
        assert everybody is not None
        return everybody if key is None else self.overrides.get(key, everybody)

    def key_of(self, call: LLMTaskMeta | AttemptRecord) -> str | None:
        """Which key a call counts under."""
        if self.by is None:
            return None
        found: str | None = getattr(call, self.by)
        return _label(found) if self.by == "stage" else found


@dataclass(frozen=True)
class BudgetEvent:
    """A budget just reached `share` (0.8 or 1.0) of its limit. `used` and `limit` are in tokens or USD."""

    budget: Budget
    key: str | None
    used: float
    limit: float
    share: float

    def __str__(self) -> str:
        unit = self.budget.unit
        return (
            f"{self.share:.0%} of the budget of {amount(self.limit, unit)} per {self.budget.per}"
            f"{of_key(self.budget.by, self.key)} is used: {amount(self.used, unit)}"
        )


class Ledger:
    """Counts attempts and calls, prices them, and keeps budgets. Safe from any thread.

    Give every ended attempt to `add_attempt` and every ended call to `add_operation`, ask `check` before a call starts
    and `summary` at the end. `prices` are by model. `path` is a file that keeps the totals of the day, so that the next
    run of the same day goes on from them; `close` writes it, and without a budget per day it is not touched.
    `now_epoch` is the wall clock, in seconds since 1970. Raises ValueError for two budgets of the same kind, InputError
    for a file that is not its own or cannot be written.
    """

    def __init__(
        self,
        prices: Mapping[str, Price] | None = None,
        budgets: Iterable[Budget] = (),
        *,
        path: Path | None = None,
        now_epoch: Callable[[], float] = time.time,
    ) -> None:
        self.prices = dict(prices or {})
        self.budgets = tuple(budgets)
        check_budgets(self.budgets)
        self._lock = threading.Lock()
        self._all = _Account()
        self._accounts: dict[tuple[str | None, str | None], _Account] = {}
        self._unpriced: set[str] = set()
        self._now_epoch = now_epoch
        self._has_days = any(budget.per == "day" for budget in self.budgets)
        self._day = _Day(path if self._has_days else None, now_epoch())
        self._used = [self._day.of(budget) if budget.per == "day" else _Used() for budget in self.budgets]
        if path is not None and self._has_days:
            finalize(self, _save_quietly, self._day)  # also at the end of the process

    def add_attempt(self, record: AttemptRecord) -> tuple[BudgetEvent, ...]:
        """Count an attempt that ended; what is returned are the budgets that it brought to 80 % or to 100 %.

        Each comes once a run or day; one add that passes both comes as 100 %.
        """
        tokens = (record.input_tokens or 0) + (record.output_tokens or 0)
        picodollars = self._picodollars(record)
        with self._lock:
            for account in (self._all, self._account(record)):
                account.add_attempt(record, tokens, picodollars)
            if tokens and picodollars is None and len(self._unpriced) < MAX_VALUES:
                self._unpriced.add(record.model_name or _NO_MODEL)
            if not self.budgets or not tokens:
                return ()
            if self._has_days:
                self._day.turn(self._now_epoch())
            events = tuple(self._charge(record, tokens, picodollars))
            if self._has_days:
                self._day.is_ahead = True
                self._day.save_in_time(self._now_epoch())
            return events

    def add_operation(self, record: OperationRecord) -> None:
        """Count a call that ended."""
        with self._lock:
            self._all.calls[record.outcome] += 1
            self._account(record).calls[record.outcome] += 1

    def check(self, meta: LLMTaskMeta) -> str | None:
        """Why no further call with this `meta` may start, and the way out; None where it may."""
        if not self.budgets:
            return None
        with self._lock:
            if self._has_days:
                self._day.turn(self._now_epoch())
            for budget, used in zip(self.budgets, self._used, strict=True):
                if budget.unit == "usd" and meta.model_name not in self.prices:
                    return _no_price(budget, meta.model_name)
                key = budget.key_of(meta)
                if used[key] >= _whole(budget, budget.limit_of(key)):
                    return _used_up(_use(budget, key, used[key]))
        return None

    def summary(self, seconds: float | None = None) -> RunSummary:
        """Everything so far. `seconds`: the length of the run."""
        with self._lock:
            if self._has_days:
                self._day.turn(self._now_epoch())
            stages = [account.as_stage(*key) for key, account in self._accounts.items()]
            budgets = [
                use for budget, used in zip(self.budgets, self._used, strict=True) for use in _uses(budget, used)
            ]
            total = self._all
            calls = total.calls.total()
            return RunSummary(
                seconds=seconds,
                calls=calls,
                calls_by_outcome=dict(total.calls.most_common()),
                attempts=total.attempts,
                attempts_per_call=total.attempts / calls if calls else None,
                resent=total.resent,
                refusals=dict(total.refusals.most_common()),
                usage=total.usage(),
                models_without_price=tuple(sorted(self._unpriced)),
                wait=total.wait.figures(),
                service=total.service.figures(),
                slowest=tuple(heapq.nlargest(LARGEST, filter(_ran, stages), key=_p95)),
                budgets=tuple(budgets),
            )

    def close(self) -> None:
        """Write the totals of the day, if there is a `path`. Raises InputError where that cannot be done."""
        with self._lock:
            self._day.turn(self._now_epoch())
            self._day.save()

    def _picodollars(self, record: AttemptRecord) -> int | None:
        price = None if record.model_name is None else self.prices.get(record.model_name)
        if price is None:
            return None
        return price.picodollars(record.input_tokens or 0, record.output_tokens or 0)

    def _account(self, record: AttemptRecord | OperationRecord) -> _Account:
        key = (_label(record.stage), record.model_name)
        found = self._accounts.get(key)
        if found is None:
            is_full = len(self._accounts) >= MAX_VALUES
            found = self._accounts.setdefault((_OTHER, _OTHER) if is_full else key, _Account())
        return found

    def _charge(self, record: AttemptRecord, tokens: int, picodollars: int | None) -> Iterator[BudgetEvent]:
        for budget, used in zip(self.budgets, self._used, strict=True):
            key = budget.key_of(record)
            before = used[key]
            used[key] = after = before + (tokens if budget.unit == "tokens" else picodollars or 0)
            limit = _whole(budget, budget.limit_of(key))
            reached = [n for n in ALERT_PERCENTS if before * 100 < limit * n <= after * 100]
            if reached:
                yield BudgetEvent(budget, key, _shown(budget, after), budget.limit_of(key), reached[-1] / 100)


def _save_quietly(day: _Day) -> None:
    if day.is_ahead:
        with suppress(InputError):
            day.save()


def check_budgets(budgets: Iterable[Budget]) -> None:
    """Raise ValueError for two budgets of the same unit, period and field."""
    seen = set()
    for budget in budgets:
        if (kind := (budget.unit, budget.per, budget.by)) in seen:
            raise ValueError(f"two budgets of the same kind: {budget}; state the stricter one alone")
        seen.add(kind)


class _Used(Counter[str | None]):
    """Of one budget, by key: tokens, or picodollars."""


class _Times:
    """Seconds of one kind; see the module about its samples."""

    __slots__ = ("_random", "count", "most", "samples", "total")

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self.most: float | None = None
        self.samples: list[float] = []
        self._random: random.Random | None = None

    def add(self, seconds: float) -> None:
        self.count += 1
        self.total += seconds
        if self.most is None or seconds > self.most:
            self.most = seconds
        if self.count <= SAMPLES:
            self.samples.append(seconds)
            return
        if self._random is None:
            self._random = random.Random(0)
        place = int(self._random.random() * self.count)
        if place < SAMPLES:
            self.samples[place] = seconds

    def figures(self) -> Times:
        p50, p95 = _p50_p95(self.samples)
        return Times(self.count, self.total, p50, p95, self.most)


class _Account:
    """What the calls of one stage to one model, or all calls, did."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.attempts = 0
        self.resent = 0
        self.refusals: Counter[str] = Counter()
        self.input_tokens = 0
        self.output_tokens = 0
        self.unknown = 0
        self.unpriced_tokens = 0
        self.priced_tokens = 0
        self.picodollars = 0
        self.wait = _Times()
        self.service = _Times()

    def add_attempt(self, record: AttemptRecord, tokens: int, picodollars: int | None) -> None:
        refused = record.limit_type is not None or record.outcome == "rejected"
        self.attempts += record.started_at is not None
        self.resent += record.resent
        if refused:
            self.refusals[self._bounded(record.limit_type or "unknown")] += 1
        if not record.resent and record.outcome != "queue_full":
            self.wait.add(record.wait_seconds)
        if record.service_seconds is not None and not refused:
            self.service.add(record.service_seconds)
            self.unknown += record.input_tokens is None or record.output_tokens is None
        self._add_tokens(record, tokens, picodollars)

    def _add_tokens(self, record: AttemptRecord, tokens: int, picodollars: int | None) -> None:
        self.input_tokens += record.input_tokens or 0
        self.output_tokens += record.output_tokens or 0
        if picodollars is None:
            self.unpriced_tokens += tokens
        else:
            self.priced_tokens += tokens
            self.picodollars += picodollars

    def _bounded(self, limit_type: str) -> str:
        return limit_type if limit_type in self.refusals or len(self.refusals) < MAX_VALUES else _OTHER

    def usage(self) -> Usage:
        nothing_known = not self.priced_tokens and bool(self.unpriced_tokens or self.unknown)
        cost = None if nothing_known else self.picodollars / _PICODOLLARS
        return Usage(self.input_tokens, self.output_tokens, self.unknown, self.unpriced_tokens, cost)

    def as_stage(self, stage: str | None, model_name: str | None) -> StageUse:
        return StageUse(
            stage,
            model_name,
            self.calls.total(),
            self.attempts,
            self.refusals.total(),
            self.wait.figures(),
            self.service.figures(),
            self.usage(),
        )


class _Day:
    """The totals of the UTC day, by budget and key, and the file that keeps them."""

    def __init__(self, path: Path | None, now: float) -> None:
        self.number = int(now // _DAY_SECONDS)
        self.saved_at = now
        self.is_ahead = False
        """Whether something was counted that the file does not have."""
        self._path = path
        self._totals: dict[tuple[Unit, str | None], _Used] = {}
        if path is not None:
            self._read(path)
            self.save()

    def of(self, budget: Budget) -> _Used:
        """The totals of one kind of budget; they stay the same object from day to day."""
        return self._totals.setdefault((budget.unit, budget.by), _Used())

    def turn(self, now: float) -> None:
        """Start anew if a later day has begun; a clock that is set back changes nothing."""
        number = int(now // _DAY_SECONDS)
        if number > self.number:
            self.number = number
            for used in self._totals.values():
                used.clear()

    def save_in_time(self, now: float) -> None:
        """Write the file if that was not done lately. A write that fails is tried again later: calls go on."""
        if self._path is None or 0 <= now - self.saved_at < SAVE_SECONDS:
            return
        self.saved_at = now
        with suppress(InputError):
            self.save()

    def save(self) -> None:
        if self._path is None:
            return
        temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(self._text(), encoding="utf-8")
            os.replace(temporary, self._path)
            self.is_ahead = False
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            raise InputError(f"{self._path}: cannot write the day's totals: {error.strerror or error}") from None

    def _text(self) -> str:
        totals = [
            {"unit": _UNIT_IN_FILE[unit], "by": by, "key": key, "used": used}
            for (unit, by), kept in self._totals.items()
            for key, used in kept.items()
        ]
        return json.dumps({"format": _FORMAT, "day": _date(self.number), "totals": totals}, indent=1) + "\n"

    def _read(self, path: Path) -> None:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["format"] != _FORMAT:
                raise ValueError(f"its format is {found['format']!r}")
            date.fromisoformat(found["day"])
            totals = [_total(entry) for entry in found["totals"]]
        except FileNotFoundError:
            return
        except OSError as error:
            raise InputError(f"{path}: cannot read the day's totals: {error.strerror or error}") from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{path}: not the day totals of llmq ({type(error).__name__}: {error}); "
                "move it away, or set llm_budget_ledger to another file"
            ) from None
        if found["day"] == _date(self.number):
            for kind, key, used in totals:
                self._totals.setdefault(kind, _Used())[key] = used


_UNIT_IN_FILE: dict[Unit, str] = {"tokens": "tokens", "usd": "picodollars"}
_UNIT_FROM_FILE: dict[str, Unit] = {name: unit for unit, name in _UNIT_IN_FILE.items()}


def _total(entry: dict[str, object]) -> tuple[tuple[Unit, str | None], str | None, int]:
    unit, by, key, used = entry["unit"], entry["by"], entry["key"], entry["used"]
    if not isinstance(used, int) or isinstance(used, bool) or used < 0:
        raise ValueError(f"used is {used!r}")
    return (_UNIT_FROM_FILE[str(unit)], _name(by)), _name(key), used


def _name(found: object) -> str | None:
    if found is None or isinstance(found, str):
        return found
    raise ValueError(f"a name is {found!r}")


def _date(number: int) -> str:
    return date.fromordinal(date(1970, 1, 1).toordinal() + number).isoformat()


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _label(stage: str | None) -> str | None:
    found = stage_attributes(stage).get("stage")
    return None if found is None else str(found)


def _whole(budget: Budget, value: float) -> float:
    """In what is counted: tokens, or picodollars."""
    return value if budget.unit == "tokens" else round(value * _PICODOLLARS)


def _shown(budget: Budget, used: int) -> float:
    return used if budget.unit == "tokens" else used / _PICODOLLARS


def _use(budget: Budget, key: str | None, used: int) -> BudgetUse:
    limit = budget.limit_of(key)
    return BudgetUse(budget.unit, budget.per, budget.by, key, _shown(budget, used), limit, used / _whole(budget, limit))


def _uses(budget: Budget, used: _Used) -> list[BudgetUse]:
    keys = [None] if budget.by is None else list(used)
    return heapq.nlargest(LARGEST, (_use(budget, key, used[key]) for key in keys), key=lambda use: use.share)


def _used_up(use: BudgetUse) -> str:
    out = "start another run" if use.per == "run" else "wait for the next day at 00:00 UTC"
    return f"the budget of {use} is used up: {amount(use.used, use.unit)} are used; {out}, or raise it (llm_budgets)"


def _no_price(budget: Budget, model: str | None) -> str:
    why = f"the budget of {amount(budget.limit_of(None), 'usd')} per {budget.per} cannot be kept"
    if model is None:
        return f"{why} for a call that names no model: its cost is unknown; set model_name in its LLMTaskMeta"
    return (
        f"{why} for model {model}, which has no price: its cost is unknown; "
        f"set it in llm_prices, {{{model}: {{input: ..., output: ...}}}}, in USD per million tokens"
    )


def _ran(stage: StageUse) -> bool:
    return stage.service.count > 0


def _p95(stage: StageUse) -> float:
    return stage.service.p95_seconds or 0.0


def _p50_p95(samples: list[float]) -> tuple[float | None, float | None]:
    """By linear interpolation (Hyndman and Fan, 1996, type 7), as `llmq.tune` does."""
    if not samples:
        return None, None
    if len(samples) == 1:
        return samples[0], samples[0]
    twentieths = quantiles(samples, n=20, method="inclusive")
    return twentieths[9], twentieths[18]
