"""Put an operating point into a settings file, and leave the rest of it as it is.

The settings that it changes are plain values of the top level, so their lines are edited and no other: a YAML library
that keeps comments still writes lists and nulls its own way.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from llmq.errors import ConfigError
from llmq.settings import Settings
from llmq.tune.recommend import OperatingPoint

_PACES = ("llm_queue_requests_per_minute", "llm_queue_tokens_per_minute")


def apply(answer: OperatingPoint, path: Path) -> dict[str, object]:
    """Set the queue's level and pace in `path`, and return what was changed: the new values by name.

    A pace that is in the file and no part of the answer becomes null: it belonged to another answer. All other lines
    stay, comments too, with their line ends; so do the file's mode and a symbolic link to it. The new text is read as
    settings before it replaces the old. Raises ConfigError where there is no recommendation, or for a file that is
    missing, cannot be read or written, or would not be valid.
    """
    if answer.level is None:
        raise ConfigError(f"nothing can be applied: {answer.reason}")
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}; name the settings file to change") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text: {error}") from None
    Settings(path)  # raises for what cannot be read as settings
    wanted: dict[str, object] = {name: None for name in _PACES if _line_of(name).search(text)}
    wanted.update(answer.settings)
    changed: dict[str, object] = {}
    for name, value in wanted.items():
        new = _with(text, name, _yaml(value))
        if new != text:
            text, changed[name] = new, value
    if changed:
        _write(path, text)
    return changed


def _line_of(name: str) -> re.Pattern[str]:
    """A setting's line: name and colon, value, comment."""
    key = rf"\ufeff?([\"']?){name}\2[ \t]*:"  # a byte order mark may stand before the first one
    return re.compile(rf"^({key})[ \t]*([^#\r\n]*?)([ \t]*(?:#[^\r\n]*)?)(?=\r?$)", re.MULTILINE)


def _with(text: str, name: str, value: str) -> str:
    """The text with a setting's value; at its end where it is not there yet."""
    line = _line_of(name)
    if line.search(text):
        return line.sub(lambda found: f"{found[1]} {value}{found[4]}", text, count=1)
    if value == "null":
        return text
    end = "\r\n" if "\r\n" in text else "\n"
    return f"{text}{'' if not text or text.endswith(end) else end}{name}: {value}{end}"


def _yaml(value: object) -> str:
    return "null" if value is None else str(value).lower()


def _write(path: Path, text: str) -> None:
    """The new file in place of the old one, if it is valid."""
    target = path.resolve()  # a link stays a link
    new = target.with_name(f".{target.name}.new")
    try:
        new.write_bytes(text.encode())
        shutil.copymode(target, new)
        try:
            Settings(new)
        except ConfigError as error:
            why = str(error).replace(str(new), str(path)).replace(new.name, path.name)
            raise ConfigError(f"{path} was not changed, since it would not be valid: {why}") from None
        new.replace(target)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        new.unlink(missing_ok=True)
