"""What a failed attempt means, and how long to wait before the next one.

`classify` reads an exception of any SDK by its shape, never by its type: `status_code`, `response.headers`, and
the `code` and `type` of the body. `Retry` is the policy of one operation. Its back-off is "full jitter" (Brooker,
"Exponential Backoff And Jitter", AWS Architecture Blog, 2015): the n-th delay is uniform between 0 and
min(cap, base * 2^(n-1)); a provider's Retry-After is a lower bound of it.

stamina was tried for this and left out: it logs every retried exception with its message, which can hold a
prompt, and its process-wide switch would change what the queue promises.
"""

import email.utils
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

import anyio

from llmq.core import Outcome
from llmq.errors import LLMQError, ProviderError, QueueError, RequestTimeout

T = TypeVar("T")


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
    """What `classify` makes of an exception.

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


Classify = Callable[[BaseException], Verdict]

_OVERLOADED = {503, 529}
_TRANSIENT = {408, 409, 500, 502, 504}
_OUT_OF_QUOTA = ("insufficient_quota", "billing_hard_limit_reached", "credit_balance_too_low")
_CONNECTION_ERRORS = {  # by name, so that no SDK need be imported
    "APIConnectionError",  # openai, anthropic
    "TransportError",  # httpx2
    "ClientConnectionError",  # aiohttp
    "ClientPayloadError",
}


def classify(error: BaseException) -> Verdict:
    """Judge an exception by its shape. Pure, and never raises.

    >>> from llmq.errors import ProviderError
    >>> classify(ProviderError("slow down", status_code=429, headers={"retry-after": "2"})).retry_after_seconds
    2.0
    """
    if not isinstance(error, Exception):
        return Verdict(Kind.CANCELLED)
    try:
        return _classify(error)
    except Exception:  # an attribute that raises, a body that contains itself: nothing to be learnt from it
        return Verdict(Kind.CALLER)


def judged(classify: Classify, error: BaseException) -> Verdict:
    """What a user's `classify` says; it is not asked about cancellation, and its own failures cost nobody a slot."""
    if not isinstance(error, Exception):
        return Verdict(Kind.CANCELLED)
    try:
        verdict = classify(error)
        if isinstance(verdict, Verdict):
            return verdict
        broken = f"returned {verdict!r}, not a Verdict"
    except Exception as failure:
        broken = f"itself raised {failure!r}"
    with suppress(Exception):
        error.add_note(f"llmq: classify() {broken}, so this was not judged")
    return Verdict(Kind.CALLER)


def describe(error: BaseException) -> str:
    """Why a call failed, without what a provider's message may repeat: prompts and keys."""
    if isinstance(error, LLMQError) and not isinstance(error, ProviderError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    verdict = classify(error)
    status = "" if verdict.status_code is None else f", status {verdict.status_code}"
    limit = "" if verdict.limit_type is None else f", limit on {verdict.limit_type}"
    return f"{verdict.kind.value}{status}{limit}"


def _classify(error: Exception) -> Verdict:
    status = _status(error)
    if status is None:
        return Verdict(Kind.TRANSIENT if _is_connection_error(error) else Kind.CALLER)
    retry_after = _retry_after_seconds(_headers(error))
    if status == 429:
        words = _body_words(error)
        if any(word in _OUT_OF_QUOTA for word in words):
            return Verdict(Kind.QUOTA, status, "quota", retry_after)
        return Verdict(Kind.RATE, status, _limit_type(words), retry_after)
    if status in _OVERLOADED:
        return Verdict(Kind.OVERLOAD, status, "overload", retry_after)
    if status in _TRANSIENT or status >= 500 or (status < 400 and _is_connection_error(error)):
        return Verdict(Kind.TRANSIENT, status, None, retry_after)
    return Verdict(Kind.CALLER, status, None, retry_after)


@dataclass(frozen=True, slots=True)
class Retry:
    """How often and how patiently one operation is attempted.

    `attempts` counts the first one. `base` and `cap` are seconds of back-off. Each attempt takes a new slot at
    the front of its class; nothing is held while it waits.
    """

    attempts: int = 4
    base: float = 0.5
    cap: float = 30.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"attempts must be at least 1 (the first call), got {self.attempts}")
        if not 0 <= self.base <= self.cap:
            raise ValueError(f"need 0 <= base <= cap seconds, got base={self.base}, cap={self.cap}")

    def delay_seconds(self, failed_attempts: int, verdict: Verdict, draw: float | None = None) -> float | None:
        """Seconds to wait before the next attempt, or None to give up.

        `draw` in [0, 1) stands for the random number. With Retry-After the delay is that, plus up to 10 % of it
        and `base` as jitter, so that not all waiters come back at one moment.
        """
        if failed_attempts >= self.attempts or not verdict.retryable:
            return None
        draw = random.random() if draw is None else draw
        backoff = draw * min(self.cap, self.base * 2.0 ** min(failed_attempts - 1, 60))
        if verdict.retry_after_seconds is None:
            return backoff
        return verdict.retry_after_seconds + min(backoff, 0.1 * verdict.retry_after_seconds + 0.1 * self.base)


async def timed(factory: Callable[[], Awaitable[T]], request_timeout: float | None) -> T:
    """Await `factory()` for at most `request_timeout` seconds. Raises `RequestTimeout`."""
    if request_timeout is None:
        return await factory()
    with anyio.move_on_after(request_timeout) as scope:
        return await factory()
    if scope.cancelled_caught:
        raise RequestTimeout(
            f"the call ran longer than request_timeout={request_timeout:g} s in its slot; raise request_timeout "
            "or ask for less"
        )
    raise AssertionError("unreachable")  # a with block that neither returned nor was cancelled


async def unqueued(
    factory: Callable[[], Awaitable[T]],
    *,
    retry: Retry | None = None,
    request_timeout: float | None = None,
    classify: Classify = classify,
) -> T:
    """What `LLMQueue.submit` does, with no queue: the same time-out, the same retries, no slot."""
    failed = 0
    while True:
        try:
            return await timed(factory, request_timeout)
        except Exception as error:
            failed += 1
            delay = None if retry is None else retry.delay_seconds(failed, judged(classify, error))
            if delay is None:
                raise
        await anyio.sleep(delay)


def _status(error: Exception) -> int | None:
    """`status_code` (openai, anthropic), `status` (aiohttp) or `response.status_code` (httpx2)."""
    for holder, name in ((error, "status_code"), (error, "status"), (getattr(error, "response", None), "status_code")):
        status = getattr(holder, name, None)
        if isinstance(status, int):
            return status
    return None


def _is_connection_error(error: Exception) -> bool:
    if isinstance(error, QueueError):
        return False
    if isinstance(error, (RequestTimeout, TimeoutError, ConnectionError, EOFError)):
        return True
    if getattr(error, "connection_lost", False):
        return True
    return any(kind.__name__ in _CONNECTION_ERRORS for kind in type(error).__mro__)


def _headers(error: Exception) -> Mapping[str, str]:
    response = getattr(error, "response", None)
    headers = getattr(response, "headers", None) or getattr(error, "headers", None)
    return headers if isinstance(headers, Mapping) else {}


def _retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """Retry-After in seconds, from `retry-after-ms` (Azure, OpenAI), a number, or an HTTP date (RFC 9110)."""
    found = {str(name).lower(): str(value) for name, value in headers.items()}
    milliseconds = _non_negative(found.get("retry-after-ms", ""), 0.001)
    if milliseconds is not None:
        return milliseconds
    value = found.get("retry-after", "")
    seconds = _non_negative(value, 1.0)
    if seconds is None and value:
        try:
            seconds = max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
        except (ValueError, TypeError):
            return None
    return seconds


def _non_negative(text: str, unit: float) -> float | None:
    try:
        value = float(text) * unit
    except ValueError:
        return None
    return value if 0 <= value < float("inf") else None


def _body_words(error: Exception) -> list[str]:
    """The machine-readable words of a refusal: code and type, of the error and of its body."""
    return list(_words(error)) + list(_words(getattr(error, "body", None)))


def _words(source: object) -> Iterator[str]:
    if isinstance(source, Mapping):
        yield from (str(source[name]).lower() for name in ("code", "type") if source.get(name))
        if isinstance(source.get("error"), Mapping):
            yield from _words(source["error"])
    elif isinstance(source, Exception):
        values = (getattr(source, name, None) for name in ("code", "type"))
        yield from (value.lower() for value in values if isinstance(value, str))


def _limit_type(words: list[str]) -> str:
    for limit_type in ("concurrency", "tokens", "requests"):
        if any(limit_type in word for word in words):
            return limit_type
    return "unknown"
