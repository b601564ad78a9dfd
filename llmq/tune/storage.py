"""Points on disk, each written as it is measured: `points.jsonl` to go on from, `points.csv` to look at."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from llmq.errors import ConfigError
from llmq.tune.guard import Prediction
from llmq.tune.limits import RateSeen, Separation
from llmq.tune.point import QUANTILES, Point
from llmq.tune.standing import Bounds

ABOUT = "sweep.json"
_COLUMNS = [field.name for field in fields(Point)]


class PointStore:
    """The points of one sweep in a folder. `what` describes the sweep: points of another one are refused."""

    def __init__(self, folder: Path, what: str, *, resume: bool) -> None:
        self.folder = folder
        self._jsonl = folder / "points.jsonl"
        self._csv = folder / "points.csv"
        self._what = what
        if not resume and self._jsonl.exists() and self._jsonl.stat().st_size > 0:
            raise ConfigError(f"{folder} holds a sweep already; resume it, or choose another folder")
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self.points = read_points(self._jsonl, what) if self._jsonl.exists() else []
        self.rewrite()

    def add(self, point: Point) -> None:
        """Keep a point, on disk first."""
        with _writing(self.folder):
            with self._jsonl.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"sweep": self._what, **asdict(point)}) + "\n")
            with self._csv.open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, _COLUMNS).writerow(asdict(point))
        self.points.append(point)

    def rewrite(self) -> None:
        """Both files anew from the points that were read: whole lines, equal in both."""
        rows = [asdict(point) for point in self.points]
        text = "".join(json.dumps({"sweep": self._what, **row}) + "\n" for row in rows)
        temporary = self._jsonl.with_suffix(".tmp")
        with _writing(self.folder):
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self._jsonl)
            with self._csv.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, _COLUMNS)
                writer.writeheader()
                writer.writerows(rows)

    def tell(self, about: dict[str, Any]) -> None:
        """Keep what is known of the sweep beside its points, in `sweep.json`."""
        with _writing(self.folder):
            (self.folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror or error}") from None


def read_points(path: Path, what: str | None = None) -> list[Point]:
    """The points of a `points.jsonl`; those of another sweep than `what` are refused, None: of any.

    A line torn by a crash is left out: that level is measured again. Raises ConfigError with file, line and key.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not text: {error}") from None
    points = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break
        whose, point = _parsed(path, number, line)
        if what is not None and whose != what:
            raise ConfigError(
                f"{path}, line {number}: a point of another sweep ({whose}), this one is {what}; choose another folder"
            )
        points.append(point)
    return points


class About(BaseModel):
    """What is known of a sweep beside its points, as `Sweep` has it."""

    model_config = ConfigDict(strict=True, extra="forbid")

    title: str = ""
    bounds: Bounds = Bounds()
    hidden_retries: bool = False
    predicted: Prediction | None = None
    stopped: str | None = None
    present: Annotated[int, Field(ge=1)] | None = None


def read_about(folder: Path) -> About:
    """What is known of a sweep beside its points; the defaults where nothing was kept. Raises ConfigError."""
    path = folder / ABOUT
    if not path.exists():
        return About()
    try:
        return About.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ConfigError(f"{path} is not of this version: {_problems(error)}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None


_POINT = TypeAdapter(Point)
_NEVER_NEGATIVE = (
    "order",
    "window_seconds",
    "warm_up_seconds",
    "succeeded",
    "attempts",
    "refused",
    "failed",
    "goodput",
)


def _parsed(path: Path, number: int, line: str) -> tuple[str, Point]:
    """A line's sweep, and its point."""
    try:
        point = _POINT.validate_json(line, strict=True)
        found = json.loads(line)
    except ValidationError as error:
        raise ConfigError(f"{path}, line {number}: not a point of a sweep: {_problems(error)}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}, line {number}: not a point of a sweep: {error}") from None
    problem = _problem(point, found)
    if problem is not None:
        raise ConfigError(f"{path}, line {number}: not a point of a sweep: {problem}")
    return found["sweep"], point


def _problem(point: Point, found: dict[str, Any]) -> str | None:
    """What is wrong with a point beyond its types, in words, or None."""
    if not isinstance(found.get("sweep"), str):
        return "sweep: the name of the sweep is missing"
    unknown = sorted(found.keys() - {"sweep", *_COLUMNS})
    if unknown:
        return f"{unknown[0]}: not known"
    if point.level < 1:
        return f"level: at least 1 is needed, got {point.level}"
    for name in _COLUMNS:
        value = getattr(point, name)
        if any(isinstance(each, float) and not math.isfinite(each) for each in _flat(value)):
            return f"{name}: not finite"
    for name in _NEVER_NEGATIVE:
        if getattr(point, name) < 0:
            return f"{name}: less than 0"
    for name in ("service_quantiles", "response_quantiles"):
        if len(getattr(point, name)) not in (0, len(QUANTILES)):
            return f"{name}: {len(QUANTILES)} are needed, or none"
    return None


def _flat(value: Any) -> Iterable[Any]:
    if isinstance(value, RateSeen | Separation):
        return [getattr(value, each.name) for each in fields(value)]
    return value if isinstance(value, tuple) else (value,)


def _problems(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
