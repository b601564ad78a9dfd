"""How many tokens a call used: told by the call, or read off its result by the shape that SDKs give it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextvars import ContextVar

from llmq.core import Job

current_job: ContextVar[Job | None] = ContextVar("llmq_job", default=None)
"""The attempt whose call runs here, where its tokens matter."""


def report_tokens(used: int) -> None:
    """Tell how many tokens this call really used, prompt and answer together, from within the call.

    For calls whose result does not carry its usage (`result.usage`, as the SDKs of OpenAI and Anthropic return it).
    What was reserved by `LLMTaskMeta.tokens` is then settled. Does nothing where no queue counts tokens.
    """
    check_tokens(used)
    job = current_job.get()
    if job is not None:
        job.used_tokens = used


def check_tokens(used: float) -> None:
    """Raise ValueError for what is no number of tokens."""
    if not 0 <= used < math.inf:
        raise ValueError(f"used tokens are a number of at least 0, got {used}")


def tokens_of(result: object) -> float | None:
    """The tokens that a result says it used, or None. Never raises.

    >>> tokens_of({"usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}})
    7
    """
    try:
        usage = _get(result, "usage")
        for source in (usage, result):
            total = _number(_get(source, "total_tokens"))
            if total is not None:
                return total
            for names in (("input_tokens", "output_tokens"), ("prompt_tokens", "completion_tokens")):
                parts = [_number(_get(source, name)) for name in names]
                if None not in parts:
                    return sum(part for part in parts if part is not None)
    except Exception:
        return None
    return None


def _get(source: object, name: str) -> object:
    return source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)


def _number(value: object) -> float | None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    return value if 0 <= value < math.inf else None
