"""Points on disk, each written as it is measured: `points.jsonl` to go on from, `points.csv` to look at."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, fields
from pathlib import Path

from llmq.errors import ConfigError
from llmq.tune.point import Point

_COLUMNS = [field.name for field in fields(Point)]


class PointStore:
    """The points of one sweep in a folder. `what` describes the sweep: points of another one are refused."""

    def __init__(self, folder: Path, what: str, *, resume: bool) -> None:
        self.folder = folder
        self._jsonl = folder / "points.jsonl"
        self._csv = folder / "points.csv"
        self._what = what
        if self._jsonl.exists() and not resume:
            raise ConfigError(f"{folder} holds a sweep already; resume it, or choose another folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.points = self._read() if self._jsonl.exists() else []
            self.rewrite()
        except OSError as error:
            raise ConfigError(f"cannot write to {folder}: {error.strerror or error}") from None

    def add(self, point: Point) -> None:
        """Keep a point, on disk first."""
        with self._jsonl.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"sweep": self._what, **asdict(point)}) + "\n")
        with self._csv.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, _COLUMNS).writerow(asdict(point))
        self.points.append(point)

    def _read(self) -> list[Point]:
        points = []
        lines = self._jsonl.read_text(encoding="utf-8").splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            if not line.endswith("\n"):
                break  # torn by a crash: that level is measured again
            try:
                found = json.loads(line)
                what = found.pop("sweep")
                point = Point(**found)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ConfigError(f"{self._jsonl}, line {number}: not a point of a sweep: {error}") from None
            if what != self._what:
                raise ConfigError(
                    f"{self._jsonl}, line {number}: a point of another sweep ({what}), this one is {self._what}; "
                    "choose another folder"
                )
            points.append(point)
        return points

    def rewrite(self) -> None:
        """Both files anew from the points that were read: whole lines, equal in both."""
        rows = [asdict(point) for point in self.points]
        text = "".join(json.dumps({"sweep": self._what, **row}) + "\n" for row in rows)
        temporary = self._jsonl.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self._jsonl)
        with self._csv.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, _COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
