"""JSON lines, read with the line named when one is bad, written so that a crash leaves at most a torn last line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

from pydantic import BaseModel, ValidationError

from llmq.errors import InputError

M = TypeVar("M", bound=BaseModel)


def read_lines(path: Path, *, whole: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers from 1 and objects; blank lines are passed over. Raises `InputError`.

    With `whole`, a last line that is not ended is passed over too: it was torn by a crash.
    """
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip() or (whole and not line.endswith("\n")):
                    continue
                try:
                    found = json.loads(line)
                except json.JSONDecodeError as error:
                    raise InputError(f"{path}, line {number}: not JSON: {error}") from None
                if not isinstance(found, dict):
                    raise InputError(f"{path}, line {number}: expected an object, got {type(found).__name__}")
                yield number, found
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: {error}") from None


def read_models(path: Path, model: type[M], key: str) -> Iterator[M]:
    """Each line as a `model`; a line that is not one, or repeats an earlier `key`, raises `InputError`."""
    seen: dict[str, int] = {}
    for number, found in read_lines(path):
        try:
            parsed = model.model_validate(found)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise InputError(f"{path}, line {number}: {problems}") from None
        value = getattr(parsed, key)
        if value in seen:
            raise InputError(f"{path}, line {number}: {key} {value!r} is already on line {seen[value]}")
        seen[value] = number
        yield parsed


def drop_torn_line(path: Path, start: bytes) -> int:
    """Cut what follows the last line end off, left there by a crash; returns how many bytes that was.

    Only if it is the beginning of a line that starts with `start`; else it is not ours, and `InputError` is raised.
    """
    with path.open("r+b") as file:
        end = _end_of_last_line(file)
        file.seek(end)
        tail = file.read()
        if tail[: len(start)] != start[: len(tail)]:
            raise InputError(f"{path} does not end in a line of a run of llmq; it is left as it is")
        file.truncate(end)
        return len(tail)


def _end_of_last_line(file: IO[bytes]) -> int:
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 65536)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def write_line(file: IO[str], record: dict[str, Any]) -> None:
    """One record, handed to the operating system at once: it survives the end of this process."""
    file.write(json.dumps(record, ensure_ascii=False) + "\n")
    file.flush()
