"""What a failed attempt means, and how long to wait before the next one.

`classify` reads an exception of any SDK by its shape, never by its type: `status_code`, `response.headers` and
`body`; what these say is judged in `llmq.dialects`. `Retry` is the policy of one operation. Its back-off is "full
jitter" (Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015): the n-th delay is uniform between 0
and min(cap, base * 2^(n-1)); a provider's Retry-After is a lower bound of it.

stamina was tried for this and left out: it logs every retried exception with its message, which can hold a
prompt, and its process-wide switch would change what the queue promises.
"""

import random
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TypeVar

import anyio

from llmq.dialects import Kind as Kind
from llmq.dialects import RateLimitState, judge_response, rate_limit_state
from llmq.dialects import Verdict as Verdict
from llmq.errors import (
    LLMQError,
    ProviderError,
    QueueCancelledError,
    QueueClosedError,
    QueueDrainingError,
    QueueDroppedError,
    QueueError,
    QueueFullError,
    QueueHaltedError,
    QueueTimeout,
    RequestTimeout,
)
from llmq.records import CallOutcome

T = TypeVar("T")

Classify = Callable[[BaseException], Verdict]

_draw_jitter: ContextVar[Callable[[], float]] = ContextVar("llmq_draw_jitter", default=random.random)

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
        broken = f"returned a {type(verdict).__qualname__}, not a Verdict"
    except Exception as failure:
        broken = f"itself raised {type(failure).__qualname__}"
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
    body = _body(error)
    if status is None and body is None:
        return Verdict(Kind.TRANSIENT if _is_connection_error(error) else Kind.CALLER)
    verdict = judge_response(status or 0, _headers(error), _with_codes(error, body))
    if verdict.kind is Kind.CALLER and (status or 0) < 400 and _is_connection_error(error):
        verdict = replace(verdict, kind=Kind.TRANSIENT)
    return replace(verdict, status_code=status)


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
        draw = _draw_jitter.get()() if draw is None else draw
        backoff = draw * min(self.cap, self.base * 2.0 ** min(failed_attempts - 1, 60))
        if verdict.retry_after_seconds is None:
            return backoff
        return verdict.retry_after_seconds + min(backoff, 0.1 * verdict.retry_after_seconds + 0.1 * self.base)


@contextmanager
def seeded_jitter(seed: int) -> Iterator[None]:
    """Draw the jitter of retries from a seed, in this context and in the tasks that it starts: for virtual time, where
    one run is to equal the next. Real processes that all drew the same would come back together."""
    token = _draw_jitter.set(random.Random(seed).random)
    try:
        yield
    finally:
        _draw_jitter.reset(token)


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


def outcome_of(error: BaseException | None, verdict: Verdict | None) -> CallOutcome:
    """How a call ended, for its record."""
    if verdict is None:
        return "ok"
    if isinstance(error, QueueFullError):
        return "queue_full"
    if isinstance(error, (QueueDroppedError, QueueClosedError, QueueDrainingError, QueueHaltedError)):
        return "dropped"
    if verdict.kind is Kind.CANCELLED or isinstance(error, QueueCancelledError):
        return "cancelled"
    if isinstance(error, (RequestTimeout, QueueTimeout)):
        return "timeout"
    return "rejected" if verdict.refused else "error"


def error_type_of(error: BaseException | None) -> str | None:
    """The name of an error's type."""
    return None if error is None else type(error).__qualname__


def _status(error: Exception) -> int | None:
    """`status_code` (openai, anthropic), `status` (aiohttp), `response.status_code` (httpx2), `code` (google-genai)."""
    for holder, name in ((error, "status_code"), (error, "status"), (getattr(error, "response", None), "status_code")):
        status = getattr(holder, name, None)
        if isinstance(status, int):
            return status
    code = _code(error)
    return code if isinstance(code, int) and 400 <= code < 600 else None


def _code(error: Exception) -> object:
    """An error's `code`, unless that only repeats its `status` (aiohttp, where to ask for it is deprecated)."""
    if isinstance(getattr(error, "status", None), int) and "code" not in vars(error):
        return None
    return getattr(error, "code", None)


def _is_connection_error(error: Exception) -> bool:
    if isinstance(error, QueueError):
        return False
    if isinstance(error, (RequestTimeout, TimeoutError, ConnectionError, EOFError)):
        return True
    if getattr(error, "connection_lost", False):
        return True
    return any(kind.__name__ in _CONNECTION_ERRORS for kind in type(error).__mro__)


def limits_told(error: BaseException) -> list[RateLimitState]:
    """The limits that the headers of a refusal tell of."""
    return rate_limit_state(_headers(error)) if isinstance(error, Exception) else []


def _headers(error: Exception) -> Mapping[str, str]:
    response = getattr(error, "response", None)
    headers = getattr(response, "headers", None) or getattr(error, "headers", None)
    return headers if isinstance(headers, Mapping) else {}


def _body(error: Exception) -> object:
    """`body` (anthropic: the whole, openai: what is in its `error`), or `details` beside a `code` (google-genai)."""
    body = getattr(error, "body", None)
    return getattr(error, "details", None) if body is None and isinstance(_code(error), int) else body


def _with_codes(error: Exception, body: object) -> object:
    """The body with the error's own code and type around it."""
    return {"code": _code(error), "type": getattr(error, "type", None), "error": body}
