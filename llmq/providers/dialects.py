"""How the simulated provider tells of limits and refusals: the headers and bodies that `llmq.dialects` reads.

Pure. A random refusal says nothing of a limit in any dialect, and the dialect `bare` never does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from llmq.providers.limits import LimitState, Refused
from llmq.providers.spec import ProviderSpec

_AZURE_NAMES = {"requests": "call rate limit", "tokens": "token rate limit", "concurrency": "concurrent request limit"}


def limit_headers(spec: ProviderSpec, states: Iterable[LimitState], wall_seconds: float) -> dict[str, str]:
    """What an answer's headers say of limits.

    OpenAI gives counts and the seconds until all is left again; Anthropic counts and the moment (RFC 3339) of that,
    `wall_seconds` since the epoch being now; Azure counts what is left and no more.
    """
    found: dict[str, str] = {}
    for state in states:
        limit, remaining = f"{state.limit:.0f}", f"{state.remaining:.0f}"
        match spec.dialect:
            case "openai":
                found[f"x-ratelimit-limit-{state.kind}"] = limit
                found[f"x-ratelimit-remaining-{state.kind}"] = remaining
                found[f"x-ratelimit-reset-{state.kind}"] = f"{state.reset_seconds:.3f}s"
            case "anthropic":
                found[f"anthropic-ratelimit-{state.kind}-limit"] = limit
                found[f"anthropic-ratelimit-{state.kind}-remaining"] = remaining
                found[f"anthropic-ratelimit-{state.kind}-reset"] = _rfc_3339(wall_seconds + state.reset_seconds)
            case "azure":
                found[f"x-ratelimit-remaining-{state.kind}"] = remaining
    return found


def retry_headers(spec: ProviderSpec, refused: Refused) -> dict[str, str]:
    """Retry-After in whole seconds, in milliseconds, or both: as the dialect has it. A set number is said in all."""
    if spec.retry_after == "none":
        return {}
    if spec.retry_after != "honest":
        seconds = spec.retry_after
    elif refused.retry_after_seconds is None or spec.dialect == "bare":
        return {}
    else:
        seconds = refused.retry_after_seconds
    found = {"retry-after": str(math.ceil(seconds)), "retry-after-ms": str(math.ceil(seconds * 1000))}
    if spec.dialect == "azure":
        del found["retry-after"]
    elif spec.dialect != "openai":
        del found["retry-after-ms"]
    return found


def refusal_body(spec: ProviderSpec, refused: Refused, model: str) -> dict[str, Any]:
    """The error object of a refusal."""
    limit_type = refused.limit_type
    if spec.dialect == "anthropic":
        return {"type": "rate_limit_error", "message": _anthropic_message(limit_type)}
    if limit_type == "random" or spec.dialect == "bare":
        return {"message": "Too many requests.", "type": None, "param": None, "code": None}
    if spec.dialect == "azure":
        message = f"Your requests to {model} have exceeded the {_AZURE_NAMES[limit_type]} of your tier."
        return {"message": message, "type": None, "param": None, "code": "429"}
    return {
        "message": f"Rate limit reached for {model} on {limit_type}.",
        "type": limit_type,
        "param": None,
        "code": "rate_limit_exceeded",
    }


def _anthropic_message(limit_type: str) -> str:
    match limit_type:
        case "random":
            return "Too many requests."
        case "concurrency":
            return "Number of concurrent connections has exceeded your rate limit."
    return f"This request would exceed the rate limit for your organization of {limit_type} per minute."


def _rfc_3339(wall_seconds: float) -> str:
    return datetime.fromtimestamp(wall_seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
