"""What the explorer's form says: texts by name, and the plan that they make."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from llmq.errors import ConfigError
from llmq.tune.guard import Caps, checked_caps

CAP_NAMES = tuple(field.name for field in fields(Caps))


@dataclass(frozen=True)
class Plan:
    """What the form says. Made by `Plan.read`, which raises ConfigError."""

    levels: list[int]
    seconds: float | None
    calls: int | None
    refine: bool
    caps: Caps

    @classmethod
    def read(cls, form: dict[str, Any]) -> Plan:
        """From texts by name; an empty one is None."""
        try:
            levels = [int(word) for word in form["levels"].replace(",", " ").split()]
        except ValueError:
            raise ConfigError(f"levels are whole numbers, like 1 2 4 8; got {form['levels']!r}") from None
        if not levels or min(levels) < 1:
            raise ConfigError(f"levels are calls at once, each at least 1; got {form['levels']!r}")
        caps = {name: _number(f"the cap on {name}", form[f"most {name}"]) for name in CAP_NAMES}
        whole = {name: None if (cap := caps[name]) is None else int(cap) for name in ("calls", "tokens")}
        calls = _number("calls", form["calls"])
        return cls(
            levels,
            _number("seconds", form["seconds"]),
            None if calls is None else max(1, int(calls)),
            form["refine"],
            Caps(**{**caps, **whole}),  # type: ignore[arg-type]
        )


def _number(name: str, text: str) -> float | None:
    if not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"{name} is a number above 0, or empty; got {text!r}")
    return value


def first_form(levels: Iterable[int] | str, options: dict[str, Any]) -> dict[str, Any]:
    """The form as `explorer` was called; `levels` as they will be read. Raises ConfigError."""
    caps = checked_caps(options.get("caps"))
    if not isinstance(levels, Iterable):
        raise ConfigError(f"levels are calls at once, a list of whole numbers; got {levels!r}")
    return {
        "levels": levels if isinstance(levels, str) else " ".join(str(level) for level in levels),
        "seconds": _text(options.get("seconds")),
        "calls": _text(options.get("calls")),
        "refine": options.get("refine", True),
        **{f"most {name}": _text(getattr(caps, name)) for name in CAP_NAMES},
    }


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.10g}"
