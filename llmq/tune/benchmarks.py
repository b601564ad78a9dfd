"""Saved pytest-benchmark JSON: read, shown as a table and as a figure.

What is read: of each benchmark its rounds, and what it put into `extra_info`. The names that mean something there:

- `goodput`, `service_p50`, `service_p95`, `wait_p50`, `wait_p95`, `share_429`, `in_flight`, `makespan`,
  `first_finished`: numbers, as in `llmq.tune.point.Point`; the last two in seconds;
- `virtual`: true where these were taken in virtual time and so are exact;
- `reference_seconds`: what the rounds of a reference took that came in between, so that a slower machine cancels out;
- `judged`: false where the gate should not look at it.

A run of a suite is a file, or a folder of files: one of each process that ran the suite.
"""

from __future__ import annotations

import io
import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from llmq.errors import ConfigError
from llmq.pages import plain
from llmq.words import number

if TYPE_CHECKING:
    from llmq.tune.figures import SweepFigure

METRICS: dict[str, bool] = {
    "goodput": True,
    "service_p50": False,
    "service_p95": False,
    "wait_p50": False,
    "wait_p95": False,
    "share_429": False,
    "in_flight": True,
    "makespan": False,
    "first_finished": False,
}
"""What is read from `extra_info`, and whether more of it is better."""


@dataclass(slots=True)
class Benchmark:
    """One benchmark over the processes that ran it; each list has an entry a process.

    `seconds`: the fastest round; noise only ever adds (Chen and Revels, 2016). `cost`: that, divided by the fastest
    round of the reference; None without one.
    `metrics`: what `extra_info` told.
    """

    name: str
    group: str
    judged: bool = True
    virtual: bool = False
    seconds: list[float] = field(default_factory=list)
    cost: list[float] | None = None
    metrics: dict[str, list[float]] = field(default_factory=dict)


def read_benchmarks(path: str | Path) -> dict[str, Benchmark]:
    """The benchmarks of a file, or of all JSON files in a folder, by full name (with the file that it is in), or by
    name where none is told. Raises `ConfigError` naming file and benchmark.
    """
    path = Path(path)
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"{path} holds no .json file; save one with `pytest benchmarks --benchmark-json FILE`")
    found: dict[str, Benchmark] = {}
    for file in files:
        for entry in _entries(file):
            try:
                _add(found, _Entry.model_validate(entry))
            except ValidationError as error:
                name = entry.get("name") if isinstance(entry, dict) else entry
                problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
                raise ConfigError(f"{file}: benchmark {str(name)[:80]!r} cannot be used: {problems}") from None
    _tell_apart(found)
    return found


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Stats(BaseModel):
    model_config = ConfigDict(strict=True)

    min: Positive


class _Extra(BaseModel):
    model_config = ConfigDict(strict=True)

    judged: bool = True
    virtual: bool = False
    reference_seconds: list[Positive] | None = None
    goodput: Amount | None = None
    service_p50: Amount | None = None
    service_p95: Amount | None = None
    wait_p50: Amount | None = None
    wait_p95: Amount | None = None
    share_429: Amount | None = None
    in_flight: Amount | None = None
    makespan: Amount | None = None
    first_finished: Amount | None = None


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True)

    name: str
    fullname: str | None = None
    group: str | None = None
    stats: _Stats
    extra_info: _Extra | None = None


def _entries(file: Path) -> list[Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not JSON: {error}") from None
    entries = content.get("benchmarks") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise ConfigError(f"{file}: no list `benchmarks`; it is not what `pytest --benchmark-json` writes")
    return entries


def _add(found: dict[str, Benchmark], entry: _Entry) -> None:
    extra, fastest = entry.extra_info or _Extra(), entry.stats.min
    known = found.setdefault(entry.fullname or entry.name, Benchmark(entry.name, entry.group or ""))
    known.judged, known.virtual = extra.judged, extra.virtual
    known.seconds.append(fastest)
    if extra.reference_seconds:
        known.cost = [*(known.cost or []), fastest / min(extra.reference_seconds)]
    for metric in METRICS:
        value = getattr(extra, metric)
        if value is not None:
            known.metrics.setdefault(metric, []).append(value)


def _tell_apart(found: dict[str, Benchmark]) -> None:
    """Those whose name is that of another one are called by their full name."""
    counts = Counter(each.name for each in found.values())
    for full, each in found.items():
        if counts[each.name] > 1:
            each.name = full


def benchmarks_table(path: str | Path) -> str:
    """A row a benchmark, as plain text: time of the fastest round, then what `extra_info` told (seconds, calls/s)."""
    found = read_benchmarks(path)
    shown = Table(title=str(path), title_justify="left", header_style="bold", box=SIMPLE_HEAD)
    shown.add_column("")
    for name in ("fastest", "to reference", "ok/s", "429", "in flight", "service p50 p95", "wait p50 p95"):
        shown.add_column(name, justify="right", no_wrap=True)
    for each in found.values():
        told = {metric: statistics.median(values) for metric, values in each.metrics.items()}
        shown.add_row(
            plain(each.name),
            _time(statistics.median(each.seconds)),
            "-" if each.cost is None else f"{statistics.median(each.cost):.2f} x",
            _cell(told, "goodput", ".2f"),
            _cell(told, "share_429", ".1%"),
            _cell(told, "in_flight", ".1f"),
            f"{_cell(told, 'service_p50', '.3f')} {_cell(told, 'service_p95', '.3f')}",
            f"{_cell(told, 'wait_p50', '.3f')} {_cell(told, 'wait_p95', '.3f')}",
        )
    return as_text(shown)


def as_text(shown: Table) -> str:
    """A table as plain text."""
    file = io.StringIO()
    plain = Console(file=file, width=140, color_system=None, markup=False, force_jupyter=False)  # names have brackets
    plain.print(shown)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines() if line.strip()) + "\n"


def _cell(told: Mapping[str, float], name: str, form: str) -> str:
    return f"{told[name]:{form}}" if name in told else "-"


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.2f} {unit}"
    return f"{seconds * 1e6:.1f} µs"


def plot_benchmarks(path: str | Path) -> SweepFigure:
    """Goodput, and service and wait percentiles, by benchmark; where none tells goodput, the time to a reference."""
    from llmq.tune.figures import SweepFigure

    found = list(read_benchmarks(path).values())
    told = [each for each in found if "goodput" in each.metrics]
    if told:
        figure = SweepFigure(figsize=(9.6, 1.6 + 0.4 * len(told)), layout="constrained")
        goodput, times = figure.subplots(1, 2, sharey=True)
        _bars(goodput, told, [statistics.median(each.metrics["goodput"]) for each in told])
        goodput.set_xlabel("successful calls per second")
        _percentiles(times, told)
    else:
        figure = SweepFigure(figsize=(9.6, 1.6 + 0.3 * len(found)), layout="constrained")
        axes = figure.subplots()
        _bars(axes, found, [statistics.median(each.cost or each.seconds) for each in found])
        calibrated = all(each.cost for each in found)
        axes.set_xlabel("time of a round, x reference" if calibrated else "time of a round, x reference or seconds")
    figure.suptitle(plain(str(path)), fontsize=10, x=0.01, ha="left", parse_math=False)
    return figure


def _bars(axes: Any, found: Sequence[Benchmark], values: Sequence[float]) -> None:
    from llmq.tune.figures import ACCENT

    axes.barh(range(len(found)), values, color=ACCENT, height=0.6)
    axes.set_yticks(range(len(found)), [plain(each.name) for each in found], fontsize=8, parse_math=False)
    axes.invert_yaxis()
    for position, value in enumerate(values):
        axes.annotate(
            number(value), (value, position), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)


def _percentiles(axes: Any, found: Sequence[Benchmark]) -> None:
    from llmq.tune.figures import ACCENT, INK, WARNING

    styles = {
        "service_p50": ("o", ACCENT, ACCENT),
        "service_p95": ("o", ACCENT, "white"),
        "wait_p50": ("s", INK, INK),
        "wait_p95": ("s", INK, "white"),
    }
    for metric, (marker, color, face) in styles.items():
        # A wait of next to nothing has no place on a logarithmic scale.
        marks = [
            (statistics.median(each.metrics[metric]), position)
            for position, each in enumerate(found)
            if statistics.median(each.metrics.get(metric, [0.0])) > 1e-4
        ]
        if marks:
            x, y = zip(*marks, strict=True)
            axes.plot(x, y, ls="", marker=marker, color=color, markerfacecolor=face, label=metric.replace("_", " "))
    refused = [(position, each.metrics["share_429"][0]) for position, each in enumerate(found) if _refused(each)]
    for position, share in refused:
        axes.annotate(
            f"429: {share:.1%}",
            (1, position),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="center",
            color=WARNING,
            fontsize=8,
        )
    axes.set_xscale("log")
    axes.set_xlabel("seconds")
    axes.grid(axis="x", color="#e6e6e6", lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False, fontsize=8, loc="best")


def _refused(each: Benchmark) -> bool:
    return each.metrics.get("share_429", [0.0])[0] > 0
