"""Two sweeps, or the benchmarks of two commits: better, worse, or undecided.

How it judges
- A change counts only where its interval leaves out "no change". All intervals of one comparison hold together with
  95 % confidence (Bonferroni: each at 1 - 0.05 / rows), so that in 95 of 100 pairs of equal runs nothing is said to
  have changed.
- Figures from virtual time are exact: there every difference beyond rounding (1e-6 of the value) is a change.
- Times of benchmarks are taken in several processes, and the process is what is counted: rounds within one share its
  memory layout, and would promise more than they hold. Each process gives one figure, its fastest round, divided by
  the fastest one of the reference beside it where there is one; their logarithms are compared by Welch's t (1947).
  Fewer than three processes on a side say nothing. A change under 5 % is not called one, however sure it is.
- Of sweeps, goodput is compared level by level as a quotient (delta method on its logarithm, from both standard
  errors), the 429 share as a difference (Newcombe 1998, method 10, from the two Wilson intervals), p95 as a quotient
  and only where its points have intervals. Overall counts the goodput at what each sweep recommends.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table
from scipy import stats

from llmq.errors import ConfigError
from llmq.tune.benchmarks import METRICS, Benchmark, as_text, read_benchmarks
from llmq.tune.point import Point, Setting
from llmq.tune.report import short
from llmq.tune.statistics import wilson
from llmq.tune.sweep import Sweep
from llmq.words import number

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Verdict = Literal["better", "worse", "undecided"]

CONFIDENCE = 0.95
MARGIN = 0.05
ROUNDING = 1e-6
LEAST_PROCESSES = 3
_Z_95 = 1.96


@dataclass(frozen=True, slots=True)
class Change:
    """One figure before and after.

    `change` is relative to `before` (0.1: 10 % more), or for `relative=False` the plain difference. `low` and `high`
    bound it, together with all other rows at 95 %; both None where nothing can be said. Equal to `change`: exact.
    `unit` of `before` and `after`; empty for shares.
    """

    what: str
    before: float
    after: float
    change: float
    low: float | None
    high: float | None
    verdict: Verdict
    relative: bool = True
    remark: str = ""
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """All rows, and what they come to. `reason` says why."""

    rows: tuple[Change, ...]
    verdict: Verdict
    reason: str

    @property
    def frame(self) -> pd.DataFrame:
        """A DataFrame, a row a `Change`; its fields as columns."""
        import pandas as pd

        return pd.DataFrame([asdict(row) for row in self.rows], columns=[each.name for each in fields(Change)])

    def plot(self, title: str = "Before and after") -> Figure:
        """One figure: relative changes with their intervals and verdicts; hollow is before, filled is after.

        Shares, whose change is no quotient, are in the text only. Raises ConfigError where nothing else was compared.
        """
        from llmq.tune.plots import plot_before_after

        rows = [row for row in self.rows if row.relative]
        if not rows:
            raise ConfigError(f"there is no relative change to draw; print the comparison: {self.reason}")
        return plot_before_after(rows, title)

    def __str__(self) -> str:
        shown = Table(header_style="bold", box=SIMPLE_HEAD)
        shown.add_column("")
        for name in ("before", "after", "change", "interval"):
            shown.add_column(name, justify="right", no_wrap=True)
        shown.add_column("verdict", no_wrap=True)
        for row in self.rows:
            verdict = row.verdict + (f" ({row.remark})" if row.remark else "")
            shown.add_row(
                row.what,
                number(row.before, 4),
                number(row.after, 4),
                _signed(row, row.change),
                _interval(row),
                verdict,
            )
        return f"{as_text(shown) if self.rows else ''}{self.verdict.capitalize()}: {self.reason}\n"


def compare_sweeps(before: Sweep | str | Path, after: Sweep | str | Path) -> Comparison:
    """Level by level, and at what each recommends. A path is a folder with `points.jsonl`, or that file.

    Raises `ConfigError` for what is no sweep, with the file named.
    """
    old, new = _sweep(before), _sweep(after)
    old_points, new_points = ({p.setting: p for p in each.judged()} for each in (old, new))
    pairs = [(f"at {short(s)}", old_points[s], new_points[s]) for s in old_points if s in new_points]
    old_answer, new_answer = old.recommend().setting, new.recommend().setting
    if old_answer is not None and new_answer is not None:
        pairs.append((_operating_name(old_answer, new_answer), old_points[old_answer], new_points[new_answer]))
    if not pairs:
        return Comparison((), "undecided", "the two sweeps have no level in common, and not both recommend one.")
    z = NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / 2 / (3 * len(pairs)))
    rows = [
        row for name, a, b in pairs for row in (_goodput(name, a, b, z), _refusals(name, a, b, z), _p95(name, a, b, z))
    ]
    if old_answer is None or new_answer is None:
        return Comparison(tuple(rows), "undecided", "not both sweeps recommend a level.")
    overall = rows[-3]
    return Comparison(tuple(rows), overall.verdict, f"goodput at the operating point {_told(overall)}.")


def compare_benchmarks(before: str | Path, after: str | Path, *, margin: float = MARGIN) -> Comparison:
    """Two saved runs of a benchmark suite, each a file of `pytest --benchmark-json` or a folder of one per process.

    `margin`: the least relative change of a time that counts. Raises `ConfigError` naming the file.
    """
    if not 0 <= margin < 1:
        raise ConfigError(f"margin is a share of at least 0 and below 1, got {margin}")
    old, new = read_benchmarks(before), read_benchmarks(after)
    shared = [(old[name], new[name]) for name in old if name in new and old[name].judged and new[name].judged]
    if not shared:
        raise ConfigError(f"{before} and {after} have no benchmark in common that is judged")
    exact = [row for a, b in shared if a.virtual and b.virtual for row in _exact(a, b)]
    samples = [sample for a, b in shared for sample in _samples(a, b)]
    noisy = [_measured(*sample, share=(1 - CONFIDENCE) / len(samples), margin=margin) for sample in samples]
    rows = (*noisy, *exact)
    worse = [row.what for row in rows if row.verdict == "worse"]
    better = [row.what for row in rows if row.verdict == "better"]
    missing = sorted(old[name].name for name in old.keys() - new.keys() if old[name].judged)
    gone = f" Not measured any more: {', '.join(missing)}." if missing else ""
    if worse:
        also = f"; better: {', '.join(better)}" if better else ""
        return Comparison(rows, "worse", f"{', '.join(worse)}{also}.{gone}")
    if better:
        return Comparison(rows, "better", f"{', '.join(better)}.{gone}")
    mute = "" if any(row.low is not None for row in noisy) or not noisy else _too_few(noisy[0])
    return Comparison(rows, "undecided", f"no change shown in {len(rows)} figures.{mute}{gone}")


def _too_few(row: Change) -> str:
    return f" Times were not judged: {row.remark}."


def _exact(before: Benchmark, after: Benchmark) -> list[Change]:
    rows = []
    for metric, more_is_better in METRICS.items():
        if metric in before.metrics and metric in after.metrics:
            a, b = (statistics.median(each.metrics[metric]) for each in (before, after))
            relative = a > 0
            change = b / a - 1 if relative else b - a
            same = math.isclose(a, b, rel_tol=ROUNDING, abs_tol=1e-9)
            verdict: Verdict = "undecided" if same else _direction(change, more_is_better)
            what = f"{before.name}: {metric}"
            remark = "exact: no change" if same else "exact"
            rows.append(Change(what, a, b, change, change, change, verdict, relative, remark))
    return rows


_Sample = tuple[str, Sequence[float], Sequence[float], bool]
"""What, before and after by process, and whether more is better."""


def _samples(before: Benchmark, after: Benchmark) -> list[_Sample]:
    if before.cost and after.cost:
        found: list[_Sample] = [(f"{before.name}: time, x reference", before.cost, after.cost, False)]
    else:
        found = [(f"{before.name}: seconds", before.seconds, after.seconds, False)]
    return found


def _measured(
    what: str, before: Sequence[float], after: Sequence[float], more_is_better: bool, *, share: float, margin: float
) -> Change:
    a, b = (math.exp(statistics.fmean(map(math.log, each))) for each in (before, after))
    change = b / a - 1
    if min(len(before), len(after)) < LEAST_PROCESSES:
        remark = f"{len(before)} and {len(after)} processes, at least {LEAST_PROCESSES} of each are needed"
        return Change(what, a, b, change, None, None, "undecided", remark=remark)
    low, high = welch([math.log(x) for x in before], [math.log(x) for x in after], share)
    low, high = math.expm1(low), math.expm1(high)
    sure = low > 0 or high < 0
    verdict: Verdict = _direction(change, more_is_better) if sure and abs(change) >= margin else "undecided"
    remark = f"under the margin of {margin:.0%}" if sure and verdict == "undecided" else ""
    return Change(what, a, b, change, low, high, verdict, remark=remark)


def welch(before: Sequence[float], after: Sequence[float], share: float) -> tuple[float, float]:
    """Interval of the difference of two means, wrong in `share` of cases.

    Welch (1947), degrees of freedom by Satterthwaite (1946). Needs two values of each.
    """
    errors = [statistics.variance(each) / len(each) for each in (before, after)]
    difference: float = statistics.fmean(after) - statistics.fmean(before)
    error = sum(errors)
    if error == 0:
        return difference, difference
    freedom = error * error / sum(e * e / (len(each) - 1) for e, each in zip(errors, (before, after), strict=True))
    half = float(stats.t.ppf(1 - share / 2, freedom)) * math.sqrt(error)
    return difference - half, difference + half


def newcombe(before: tuple[int, int], after: tuple[int, int], z: float) -> tuple[float, float]:
    """Interval of the difference of two shares, each (hits, total): Newcombe (1998), method 10, from Wilson's."""
    shares = [hits / total if total else 0.0 for hits, total in (before, after)]
    (low_a, high_a), (low_b, high_b) = wilson(*before, z), wilson(*after, z)
    difference = shares[1] - shares[0]
    down = math.hypot(shares[1] - low_b, high_a - shares[0])
    up = math.hypot(high_b - shares[1], shares[0] - low_a)
    return difference - down, difference + up


def _goodput(name: str, before: Point, after: Point, z: float) -> Change:
    a, b = before.goodput, after.goodput
    errors = before.goodput_error, after.goodput_error
    return replace(_quotient(f"{name}: goodput", a, b, *errors, z, more_is_better=True), unit="calls/s")


def _p95(name: str, before: Point, after: Point, z: float) -> Change:
    return replace(_times(f"{name}: service p95", before, after, z), unit="s")


def _times(what: str, before: Point, after: Point, z: float) -> Change:
    a, b = before.service_p95, after.service_p95
    if a is None or b is None:
        return Change(what, a or math.nan, b or math.nan, math.nan, None, None, "undecided", remark="too few calls")
    errors = [_p95_error(point) for point in (before, after)]
    if errors[0] is None or errors[1] is None:
        return Change(what, a, b, b / a - 1, None, None, "undecided", remark="its points have no interval")
    return _quotient(what, a, b, errors[0], errors[1], z, more_is_better=False)


def _p95_error(point: Point) -> float | None:
    low, high = point.service_p95_low, point.service_p95_high
    return None if low is None or high is None else (high - low) / (2 * _Z_95)


def _quotient(
    what: str, a: float, b: float, error_a: float, error_b: float, z: float, *, more_is_better: bool
) -> Change:
    if a <= 0 or b <= 0:
        return Change(what, a, b, math.nan, None, None, "undecided", remark="nothing succeeded")
    half = z * math.hypot(error_a / a, error_b / b)
    low, high = (math.expm1(math.log(b / a) + sign * half) for sign in (-1, 1))
    return Change(what, a, b, b / a - 1, low, high, _beyond_zero(low, high, more_is_better))


def _refusals(name: str, before: Point, after: Point, z: float) -> Change:
    a, b = before.share_429, after.share_429
    low, high = newcombe((before.refused, before.attempts), (after.refused, after.attempts), z)
    return Change(f"{name}: 429 share", a, b, b - a, low, high, _beyond_zero(low, high, False), relative=False)


def _beyond_zero(low: float, high: float, more_is_better: bool) -> Verdict:
    return "undecided" if low <= 0 <= high else _direction(low, more_is_better)


def _direction(change: float, more_is_better: bool) -> Verdict:
    return "better" if (change > 0) == more_is_better else "worse"


def _sweep(source: Sweep | str | Path) -> Sweep:
    if isinstance(source, Sweep):
        return source
    if not isinstance(source, str | Path):
        raise ConfigError(f"a sweep, or the path of one, is needed; got {type(source).__name__}")
    return Sweep.read(source)


def _operating_name(before: Setting, after: Setting) -> str:
    return f"operating point {short(before)}" + ("" if before == after else f" -> {short(after)}")


def _told(row: Change) -> str:
    return f"changed by {_signed(row, row.change)} {_interval(row)}"


def _signed(row: Change, value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:+.1%}" if row.relative else f"{100 * value:+.2f} points"


def _interval(row: Change) -> str:
    if row.low is None or row.high is None:
        return "-"
    return "exact" if row.low == row.high else f"[{_signed(row, row.low)}, {_signed(row, row.high)}]"
