"""What providers say over HTTP: refusals, how long to wait, limits, usage, and the end of a stream.

Read are the dialects of OpenAI, Azure OpenAI, Anthropic, Groq and Gemini (native, and OpenAI-compatible, where an
error may come as a list of one), and whatever else uses their words.

- A refusal is judged by its status first, then by codes and types, and by the sentences of its message where nothing
  else tells. A message is read and forgotten: it may repeat a prompt. Where a 4xx can quote the caller, only how
  a message begins counts.
- Which limit refused is told by the first source that names exactly one: codes and types, Gemini's quota ids, the
  message, the headers (one dimension with nothing left). `too_many_requests` is the name of the status 429 and names
  no limit. "You exceeded your current quota" is Gemini's sentence for a rate, so only a code means money.
- A request that is larger than its whole limit ("Request too large", a 413 at Groq, a 429 at OpenAI) is the caller's
  error: it fails again however long one waits.
- How long to wait is told by the first of: `retry-after-ms`, Retry-After, Gemini's RetryInfo, the message, and the
  reset of what the headers call exhausted.
- An error inside a stream that began with 200 has no status of its own and is judged by its codes and types alone.
- JSON text cannot hold an unescaped quote, so `"finish_reason":"` in the bytes of an event is a key with a string,
  never generated text. It may still be a key of a tool call's arguments: such bytes only say that the event is worth
  parsing, and the parsed event decides. Most events are passed over unparsed.

Nothing here raises on what a provider sends, and nothing but the wall clock is read; `now` (seconds since the epoch)
stands for it.
"""

import email.utils
import json
import re
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum

from llmq.core import Outcome


class Kind(StrEnum):
    """What a failure says about the provider."""

    RATE = "rate"
    """Refused: too many requests or tokens in a time, or too many at once."""
    OVERLOAD = "overload"
    """Refused: the provider itself is short of capacity."""
    QUOTA = "quota"
    """Refused: out of money. Never retried."""
    TRANSIENT = "transient"
    """Failed on the way (5xx, cut connection, time-out); the same request may succeed."""
    CALLER = "caller"
    """The caller's own error; the same request would fail again."""
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `classify` makes of an exception, and `judge_response` of an answer.

    `limit_type` tells which limit refused: requests, tokens, concurrency, overload, quota or unknown; None where
    nothing was refused.
    """

    kind: Kind
    status_code: int | None = None
    limit_type: str | None = None
    retry_after_seconds: float | None = None

    @property
    def refused(self) -> bool:
        """Whether the provider turned the request away."""
        return self.kind in (Kind.RATE, Kind.OVERLOAD, Kind.QUOTA)

    @property
    def retryable(self) -> bool:
        """Whether another attempt can help."""
        return self.kind in (Kind.RATE, Kind.OVERLOAD, Kind.TRANSIENT)

    @property
    def outcome(self) -> Outcome:
        """The ending that the scheduler counts."""
        return Outcome.REJECTED if self.kind in (Kind.RATE, Kind.OVERLOAD) else Outcome.IGNORED


@dataclass(frozen=True, slots=True)
class RateLimitState:
    """What headers say of one limit. `dimension`: requests, tokens, input_tokens or output_tokens.

    Over which time it counts is the provider's own affair: Groq's requests are those of a day.
    """

    dimension: str
    limit: float | None
    remaining: float | None
    reset_seconds: float | None


@dataclass(frozen=True, slots=True)
class Usage:
    """The tokens that a response says it used, as the provider counts them (Anthropic's input is without its cache)."""

    input_tokens: int | None
    output_tokens: int | None
    model: str | None


# Refusals

_OVERLOADED = {498, 503, 529}  # 498: Groq's flex tier is full
_TRANSIENT = {408, 409, 500, 502, 504}

_CODE_OF_QUOTA = re.compile(
    r"insufficient_(?:quota|balance|credit|fund)|billing|credit_balance|spend_limit|usage_limit_exceeded"
    r"|exceeded_current_quota|blocked_api_access"
)
_TEXT_OF_QUOTA = re.compile(  # matched, not searched: a 400 may quote the caller further on
    r"your credit balance is too low|you have reached your specified (?:\w+ ){0,2}usage limits"
    r"|insufficient (?:balance|credit)"
)
_CODE_OF_OVERLOAD = re.compile(r"overloaded|(?:service|resource)_unavailable|\bunavailable\b|tier_capacity_exceeded")
_TEXT_OF_OVERLOAD = re.compile(r"overloaded|experiencing high demand")
_CODE_OF_RATE = re.compile(r"rate_?limit|resource_exhausted")
_CODE_OF_FAILURE = re.compile(r"server_?error|\bapi_error\b|\binternal\b|timeout_error")
_TEXT_OF_TOO_LARGE = re.compile(r"request too large")

_CODE_OF_LIMIT = re.compile(
    r"(?P<nothing>too_many_requests|invalid_request)"
    r"|(?P<concurrency>concurren\w*)"
    r"|(?P<tokens>token|\b[io]?tp[mdhs]\b)"
    r"|(?P<requests>requests|request_(?:rate|limit)|\brp[mdhs]\b)"
)
_TEXT_OF_LIMIT = re.compile(
    r"(?P<concurrency>concurren\w*(?: \w+)?)"
    r"|(?P<tokens>tokens? per\b|tokens?[ -](?:rate|usage|limit|quota)|too many tokens|\b[io]?tp[mdhs]\b"
    r"|(?:reached|exceeded) for (?:input |output )?tokens|token_count)"
    r"|(?P<requests>requests? per\b|(?:requests?|calls?)[ -](?:rate limit|limit|quota)|\brp[mdhs]\b"
    r"|(?:reached|exceeded) for requests|_requests\b)"
)

_NESTED = ("error", "errors", "message", "detail", "details", "innererror", "violations", "metadata")
_CODES = ("code", "type", "status", "reason", "error_code")
_QUOTAS = ("quotaId", "quotaMetric", "quota_limit", "quota_metric")
_MOST_PARTS = 100
_MOST_TEXT = 4000


def judge_response(status: int, headers: Mapping[str, str], body: object, now: float | None = None) -> Verdict:
    """What an answer that is an error means. `body` is its parsed JSON, its text, or None.

    A status below 400 is that of a stream in which the error came. Never raises.

    >>> judge_response(429, {"retry-after": "2"}, {"error": {"type": "tokens", "code": "rate_limit_exceeded"}})
    Verdict(kind=<Kind.RATE: 'rate'>, status_code=429, limit_type='tokens', retry_after_seconds=2.0)
    """
    now = time.time() if now is None else now
    said = _said(body)
    kind = _kind(status, said)
    exhausted = [state for state in rate_limit_state(headers, now) if state.remaining == 0] if kind is Kind.RATE else []
    limit_type = _limit_type(kind, said, exhausted)
    wait = _header_wait(headers, now)
    if wait is None and kind in (Kind.RATE, Kind.OVERLOAD):
        wait = said.wait
    if wait is None:
        wait = _reset_wait(exhausted, limit_type)
    return Verdict(kind, status, limit_type, wait)


@dataclass(slots=True)
class _Said:
    """What a body says, in lower case."""

    codes: list[str]
    quotas: list[str]
    texts: list[str]
    wait: float | None


def _said(body: object) -> _Said:
    parts = _parts(body)
    mappings = [part for part in parts if isinstance(part, Mapping)]
    texts = [part[:_MOST_TEXT].lower() for part in parts if isinstance(part, str)]
    delays = (_duration(delay) for delay in _strings(mappings, ("retryDelay",)))
    waits = [wait for wait in (*delays, *map(_text_wait, texts)) if wait is not None]
    codes = [re.sub(r"[\s-]+", "_", code) for code in _strings(mappings, _CODES)]
    return _Said(codes, _strings(mappings, _QUOTAS), texts, waits[0] if waits else None)


def _parts(body: object) -> list[object]:
    """The objects and sentences of an error, the outer ones first; each once, as a body may contain itself."""
    parts: list[object] = []
    seen: set[int] = set()
    todo = deque([body])
    while todo and len(seen) < _MOST_PARTS:
        part = todo.popleft()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, Mapping):
            todo.extend(part[name] for name in _NESTED if name in part)
        elif isinstance(part, list):
            todo.extend(part[:_MOST_PARTS])
        parts.append(part)
    return parts


def _strings(mappings: Iterable[Mapping[object, object]], names: tuple[str, ...]) -> list[str]:
    values = (mapping.get(name) for mapping in mappings for name in names)
    return [value[:_MOST_TEXT].lower() for value in values if isinstance(value, str)]


def _kind(status: int, said: _Said) -> Kind:
    in_stream = status < 400
    provider_speaks = status == 429 or status >= 500
    if status == 402 or (status < 500 and (_any(_CODE_OF_QUOTA, said.codes) or _begins(_TEXT_OF_QUOTA, said.texts))):
        return Kind.QUOTA
    if status in _OVERLOADED or _any(_CODE_OF_OVERLOAD, said.codes):
        return Kind.OVERLOAD
    if provider_speaks and _any(_TEXT_OF_OVERLOAD, said.texts):
        return Kind.OVERLOAD
    if (in_stream or status == 429) and _begins(_TEXT_OF_TOO_LARGE, said.texts):
        return Kind.CALLER
    if status == 429:
        return Kind.RATE
    if (in_stream or status == 403) and _any(_CODE_OF_RATE, said.codes):
        return Kind.RATE
    if status in _TRANSIENT or status >= 500 or (in_stream and _any(_CODE_OF_FAILURE, said.codes)):
        return Kind.TRANSIENT
    return Kind.CALLER


def _any(pattern: re.Pattern[str], strings: list[str]) -> bool:
    return any(pattern.search(string) for string in strings)


def _begins(pattern: re.Pattern[str], strings: list[str]) -> bool:
    return any(pattern.match(string) for string in strings)


def _limit_type(kind: Kind, said: _Said, exhausted: list[RateLimitState]) -> str | None:
    if kind in (Kind.OVERLOAD, Kind.QUOTA):
        return kind.value
    if kind is not Kind.RATE:
        return None
    sources = ((_CODE_OF_LIMIT, said.codes), (_CODE_OF_LIMIT, said.quotas), (_TEXT_OF_LIMIT, said.texts))
    for named in (*(_named(pattern, strings) for pattern, strings in sources), {_coarse(state) for state in exhausted}):
        if len(named) == 1:
            return named.pop()
    return "unknown"


def _named(pattern: re.Pattern[str], strings: list[str]) -> set[str]:
    found = {match.lastgroup for string in strings for match in pattern.finditer(string)}
    return {name for name in found if name is not None and name != "nothing"}


def _coarse(state: RateLimitState) -> str:
    return "requests" if state.dimension == "requests" else "tokens"


# How long to wait

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_UNITS |= {"millisecond": 1e-3, "sec": 1.0, "second": 1.0, "min": 60.0, "minute": 60.0, "hour": 3600.0, "day": 86400.0}
_UNITS |= {f"{name}s": _UNITS[name] for name in ("millisecond", "sec", "second", "min", "minute", "hour", "day")}
_NUMBER_AND_UNIT = r"\d+(?:\.\d+)?\s*[a-zµ]+"
_DURATION = re.compile(rf"\s*(?:{_NUMBER_AND_UNIT}\s*)+")
_STEP = re.compile(r"(\d+(?:\.\d+)?)\s*([a-zµ]+)")
_TRY_AGAIN = re.compile(rf"(?:try again|retry) (?:in|after) ((?:{_NUMBER_AND_UNIT}\s*)+)")
_NO_DURATION = 1e9
"""A number of seconds above this (32 years) is a moment since the epoch."""


def _header_wait(headers: Mapping[str, str], now: float) -> float | None:
    """Retry-After in seconds, from `retry-after-ms` (Azure, OpenAI), a number, or an HTTP date (RFC 9110)."""
    found = {str(name).lower(): str(value) for name, value in headers.items()}
    milliseconds = _number(found.get("retry-after-ms", ""))
    if milliseconds is not None:
        return milliseconds * 0.001
    value = found.get("retry-after", "")
    seconds = _number(value)
    return _http_date_wait(value, now) if seconds is None and value else seconds


def _http_date_wait(value: str, now: float) -> float | None:
    try:
        return max(0.0, _moment(email.utils.parsedate_to_datetime(value)) - now)
    except (ValueError, TypeError, OverflowError):
        return None


def _text_wait(text: str) -> float | None:
    """The "Please try again in 6m0s" of a message in lower case."""
    found = _TRY_AGAIN.search(text)
    return None if found is None else _duration(found.group(1))


def _reset_wait(exhausted: list[RateLimitState], limit_type: str | None) -> float | None:
    resets = [
        state.reset_seconds
        for state in exhausted
        if state.reset_seconds is not None and limit_type in (_coarse(state), "unknown")
    ]
    return max(resets, default=None)


def _until(value: str, now: float) -> float | None:
    """Seconds to a reset: given as seconds, as a duration, as a moment (RFC 3339, or seconds since the epoch)."""
    seconds = _number(value)
    if seconds is not None:
        return seconds if seconds < _NO_DURATION else max(0.0, seconds - now)
    duration = _duration(value.lower())
    if duration is not None:
        return duration
    try:
        return max(0.0, _moment(datetime.fromisoformat(value)) - now)
    except (ValueError, OverflowError):
        return None


def _moment(date: datetime) -> float:
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()


def _duration(text: str) -> float | None:
    """Seconds of "6m0s", "1.5s", "20ms", "45 seconds"."""
    if not _DURATION.fullmatch(text):
        return None
    steps = [(float(number), _UNITS.get(unit)) for number, unit in _STEP.findall(text)]
    total = sum(number * unit for number, unit in steps if unit is not None)
    return total if total < float("inf") and all(unit is not None for _, unit in steps) else None


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value < float("inf") else None


# Limits

_DIMENSIONS = ("requests", "tokens", "input_tokens", "output_tokens")
_FIELDS = ("limit", "remaining", "reset")
_LIMIT_HEADERS = {f"x-ratelimit-{field}-{name}": (name, field) for name in _DIMENSIONS[:2] for field in _FIELDS} | {
    f"anthropic-ratelimit-{name.replace('_', '-')}-{field}": (name, field) for name in _DIMENSIONS for field in _FIELDS
}


def rate_limit_state(headers: Mapping[str, str], now: float | None = None) -> list[RateLimitState]:
    """The limits that the headers of a response tell of, `[]` where they tell of none.

    Azure's -1 for "not known" is None, and a limit of which nothing but a reset is known is left out.

    >>> rate_limit_state({"X-RateLimit-Remaining-Requests": "4", "x-ratelimit-reset-requests": "1m30s"})
    [RateLimitState(dimension='requests', limit=None, remaining=4.0, reset_seconds=90.0)]
    """
    found: dict[str, dict[str, str]] = {}
    for name, value in headers.items():
        place = _LIMIT_HEADERS.get(name.lower())
        if place is not None:
            found.setdefault(place[0], {})[place[1]] = str(value)
    if not found:
        return []
    now = time.time() if now is None else now
    states = (_state(name, found[name], now) for name in _DIMENSIONS if name in found)
    return [state for state in states if state.limit is not None or state.remaining is not None]


def _state(dimension: str, fields: Mapping[str, str], now: float) -> RateLimitState:
    limit, remaining, reset = (fields.get(field, "") for field in _FIELDS)
    return RateLimitState(dimension, _number(limit), _number(remaining), _until(reset, now))


# Usage


def usage_of(body: object) -> Usage | None:
    """What a response, or an event of its stream, says of its tokens; None where it says nothing. Never raises.

    A later event of a stream replaces the numbers of an earlier one: they are totals, and None is "not told here".

    >>> usage_of({"model": "gpt-4o", "usage": {"prompt_tokens": 9, "completion_tokens": 2}})
    Usage(input_tokens=9, output_tokens=2, model='gpt-4o')
    """
    if not isinstance(body, dict):
        return None
    for name in (None, "response", "message", "x_groq"):
        holder = body if name is None else body.get(name)
        if isinstance(holder, dict):
            tokens_in, tokens_out = _tokens(holder)
            if tokens_in is not None or tokens_out is not None:
                return Usage(tokens_in, tokens_out, _model(holder) or _model(body))
    return None


def _tokens(holder: dict[str, object]) -> tuple[int | None, int | None]:
    usage = holder.get("usage")
    if isinstance(usage, dict):
        return _count(usage, "prompt_tokens", "input_tokens"), _count(usage, "completion_tokens", "output_tokens")
    usage = holder.get("usageMetadata")
    if isinstance(usage, dict):
        answer, thoughts = _count(usage, "candidatesTokenCount"), _count(usage, "thoughtsTokenCount")
        told = answer is not None or thoughts is not None
        return _count(usage, "promptTokenCount"), (answer or 0) + (thoughts or 0) if told else None
    return None, None


def _count(usage: dict[str, object], *names: str) -> int | None:
    """The first of these that is a number of tokens."""
    for name in names:
        value = usage.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
    return None


def _model(holder: dict[str, object]) -> str | None:
    return next((name for key in ("model", "modelVersion") if isinstance(name := holder.get(key), str)), None)


# The end of a stream

_DONE = b"[DONE]"
_MAYBE_LAST = re.compile(
    rb'"(?:(?:finish_reason|finishReason|blockReason)"\s*:\s*"|error"|message_stop"|response\.(?:completed|incomplete|failed)")'
)
_KNOWN_START = re.compile(  # the first key, or the second after a plain string, is one of the event itself
    rb'\{\s*"(?:type"\s*:\s*"(?:response\.|content_block_(?:start|delta|stop)"|message_(?:start|delta|stop)"|ping")'
    rb'|candidates"\s*:\s*\[|choices"\s*:\s*\['
    rb'|id"\s*:\s*"[^"\\]*"\s*,\s*"object"\s*:\s*"chat\.completion\.chunk")'
)
_MAYBE_KNOWN = re.compile(rb'"(?:type|choices|candidates|promptFeedback|usageMetadata|error)"\s*:')
_LAST_TYPES = ("message_stop", "response.completed", "response.incomplete", "response.failed")
_ANTHROPIC_TYPES = {"message_start", "message_delta", "message_stop", "ping"}
_ANTHROPIC_TYPES |= {"content_block_start", "content_block_delta", "content_block_stop"}


def is_last_event(data: bytes) -> bool:
    r"""Whether the payload of one `data:` line says that its stream is complete, or has failed.

    >>> is_last_event(b'{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}')
    True
    >>> is_last_event(rb'{"choices":[{"delta":{"content":"\"finish_reason\":\"stop\""},"finish_reason":null}]}')
    False
    """
    if _MAYBE_LAST.search(data) is None:
        return data.strip() == _DONE
    event = _event(data)
    return _failed(event) or event.get("type") in _LAST_TYPES or _finished(event)


def judge_event(data: bytes) -> Verdict | None:
    """What the payload of one `data:` line means, if it is an error; None: it is none."""
    if b'"error"' not in data:
        return None
    event = _event(data)
    body = event.get("response") if event.get("type") == "response.failed" else event
    failed = _failed(event) or (isinstance(body, dict) and body is not event and bool(body.get("error")))
    if not failed:
        return None
    error = body.get("error") if isinstance(body, dict) else None
    code = error.get("code") if isinstance(error, dict) else None
    status = code if isinstance(code, int) and 400 <= code < 600 else 200  # vLLM and OpenRouter give it there
    return replace(judge_response(status, {}, body), status_code=None)


def is_known_event(data: bytes) -> bool:
    """Whether one `data:` payload is of a dialect whose end `is_last_event` knows."""
    if _KNOWN_START.match(data) is not None or data.strip() == _DONE:
        return True
    if _MAYBE_KNOWN.search(data) is None:
        return False
    event = _event(data)
    kind = event.get("type")
    if isinstance(kind, str) and (kind in _ANTHROPIC_TYPES or kind.startswith("response.")):
        return True
    gemini = isinstance(event.get("promptFeedback"), dict) or isinstance(event.get("usageMetadata"), dict)
    chunks = isinstance(event.get("choices"), list) or isinstance(event.get("candidates"), list)
    return chunks or gemini or _failed(event)


def _event(data: bytes) -> dict[str, object]:
    try:
        event = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    if isinstance(event, list) and event:
        event = event[0]
    return event if isinstance(event, dict) else {}


def _failed(event: dict[str, object]) -> bool:
    return event.get("type") == "error" or bool(event.get("error"))


def _finished(event: dict[str, object]) -> bool:
    """Whether an answer in it has its reason to end (an empty one is none), or the prompt was blocked (Gemini)."""
    feedback = event.get("promptFeedback")
    if isinstance(feedback, dict) and feedback.get("blockReason"):
        return True
    return _any_has(event.get("choices"), "finish_reason") or _any_has(event.get("candidates"), "finishReason")


def _any_has(answers: object, reason: str) -> bool:
    return isinstance(answers, list) and any(isinstance(answer, dict) and answer.get(reason) for answer in answers)
