"""How many tokens a call used: told by the call, or read off its result by the shape that SDKs give it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

_TELLS_NOTHING = (str, bytes, int, float, list, tuple)


class Tokens(NamedTuple):
    """Of the prompt, and of the answer."""

    input: float
    output: float


def check_tokens(used: float) -> None:
    """Raise ValueError for what is no number of tokens."""
    if not 0 <= used < math.inf:
        raise ValueError(f"used tokens are a number of at least 0, got {used}")


def tokens_of(result: object) -> Tokens | None:
    """The tokens that a result says it used, or None. Never raises. Where it tells only a total, the answer has 0.

    >>> tokens_of({"usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}})
    Tokens(input=3, output=4)
    """
    if result is None or isinstance(result, _TELLS_NOTHING):
        return None
    try:
        usage = _get(result, "usage")
        for source in (usage, result):
            for names in (("input_tokens", "output_tokens"), ("prompt_tokens", "completion_tokens")):
                prompt, answer = (_number(_get(source, name)) for name in names)
                if prompt is not None and answer is not None:
                    return Tokens(prompt, answer)
            total = _number(_get(source, "total_tokens"))
            if total is not None:
                return Tokens(total, 0)
    except Exception:
        return None
    return None


def _get(source: object, name: str) -> object:
    return source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)


def _number(value: object) -> float | None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    return value if 0 <= value < math.inf else None
