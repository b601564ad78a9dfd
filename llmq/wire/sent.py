"""One request that left, and what came back of it.

Rules
- A call that runs in the queue is the `current` one of its task and of the tasks that it starts. Outside of a call
  nothing is noted, and nothing is changed.
- Whoever sends (`httpx2.py`, `aiohttp.py`) asks `sending`, and tells what becomes of it: `answered`, each piece that is
  read, `end`. A request ends once: with its last byte, a failure, or when its answer is given up.
- A streamed answer is complete when its last event has come. One that ends before is a failure, and its reader is told,
  where we know how such streams end.
- An error that comes as an event of a stream is one of the request, whatever its reader makes of it.
- Answers are looked at for what they used and why they were refused; nothing of what they say is kept. With
  `Telemetry(content=True)` prompts and answers go on the request's span; answers that are streamed do not.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING
from weakref import ref

from llmq import waiters
from llmq.dialects import (
    RateLimitState,
    Usage,
    is_known_event,
    is_last_event,
    judge_event,
    judge_response,
    rate_limit_state,
    usage_of,
)
from llmq.errors import StreamCutError
from llmq.retry import Kind, Verdict, classify
from llmq.usage import Tokens, check_tokens
from llmq.wire import content

if TYPE_CHECKING:
    from llmq.operations import Operation
    from llmq.telemetry import AttemptSpan

MAX_BODY_BYTES = 4 * 2**20
"""Of an answer, or one event of a stream, that is looked at; a longer one is passed on unseen."""


class Place(ref["Operation"]):
    """A call that was entered in a task (weakly: a dropped slot goes), and the one around it."""

    __slots__ = ("outer",)

    outer: Place | None

    @property
    def operation(self) -> Operation | None:
        """The call, as long as it has not ended."""
        operation = self()
        return None if operation is None or operation.closed else operation


_current: ContextVar[Place | None] = ContextVar("llmq_place", default=None)


def enter(operation: Operation) -> Place:
    """Make a call the current one of this task. Returns what `leave` wants."""
    place = Place(operation)
    outer = _current.get()
    place.outer = None if outer is None else _open(outer)
    _current.set(place)
    return place


def leave(place: Place) -> None:
    """Undo `enter`. In another task, or before a call that was entered later is left, the end of the call does it."""
    if _current.get() is place:
        _current.set(None if place.outer is None else _open(place.outer))


def current() -> Operation | None:
    """The call that holds a slot here, or None."""
    place = _open(_current.get())
    operation = None if place is None else place.operation
    return operation if operation is not None and operation.running else None


def _open(place: Place | None) -> Place | None:
    """The innermost that has not ended."""
    while place is not None and place.operation is None:
        place = place.outer
    return place


_EVENT_STREAM = "text/event-stream"
_COMPRESSED = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
_USAGE = (b'"usage"', b'"usageMetadata"')


class Sent:
    """A request of a call. Times are seconds on the queue's clock; None: not yet, or not known."""

    __slots__ = (
        "_buffer",
        "_decoder",
        "_operation",
        "_reads",
        "before",
        "complete",
        "ended_at",
        "error",
        "first_chunk_at",
        "gaps",
        "input_tokens",
        "known",
        "last_chunk_at",
        "late",
        "limits",
        "number",
        "output_tokens",
        "request_headers",
        "response_model",
        "sent_at",
        "span",
        "status_code",
        "streamed",
        "verdict",
    )

    def __init__(self, operation: Operation) -> None:
        self._operation: Operation | None = operation
        self.sent_at = waiters.now()
        self.ended_at: float | None = None
        self.status_code: int | None = None
        self.verdict: Verdict | None = None
        self.error: BaseException | None = None
        self.streamed = False
        self.known = False
        self.complete = False
        self.first_chunk_at: float | None = None
        self.last_chunk_at: float | None = None
        self.gaps: list[float] = []
        self.input_tokens: int | None = None
        self.output_tokens: int | None = None
        self.response_model: str | None = None
        self.limits: tuple[RateLimitState, ...] = ()
        self.request_headers: Mapping[str, str] = {}
        self.span: AttemptSpan | None = None
        self.late = False
        """Whether it goes on although its call is over."""
        self.number = 0
        self.before: Sent | None = None
        """The one before it in the same slot."""
        self._buffer = bytearray()
        self._reads = False
        self._decoder: zlib._Decompress | None = None

    @property
    def failed(self) -> bool:
        """Whether it was refused or broke; not if only nobody wanted it, or the rest of its answer."""
        return self.verdict is not None and self.verdict.kind is not Kind.CANCELLED

    @property
    def wants_content(self) -> bool:
        """Whether `asked` is to be told the request's body."""
        return self.span is not None and self.span.wants_content

    def asked(self, body: bytes) -> None:
        """The request's body."""
        self._show(content.INPUT, content.asked(_parsed(body)))

    def answered(self, status: int, headers: Mapping[str, str]) -> None:
        """A success has begun: its head is there."""
        self.status_code = status
        self._heed(headers)
        kind = headers.get("content-type", "")
        encoding = headers.get("content-encoding", "identity").lower()
        self.streamed = kind.startswith(_EVENT_STREAM)
        self._reads = (self.streamed or "json" in kind) and (encoding == "identity" or encoding in _COMPRESSED)
        if encoding in _COMPRESSED:
            self._decoder = zlib.decompressobj(_COMPRESSED[encoding])

    def refused(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """It was refused or failed, and ended so."""
        self.status_code = status
        self._heed(headers)
        self.verdict = judge_response(status, headers, _parsed(body))
        if self._operation is not None:
            self._operation.refused(self.verdict)
        self.end(None)

    def read(self, data: bytes) -> None:
        """A piece of the answer was read."""
        if not self._reads:
            return
        if self._decoder is not None:
            try:
                data = self._decoder.decompress(data)
            except zlib.error:
                self._reads = False
                return
        self._buffer += data
        if self.streamed and (b"\n" in data or b"\r" in data):
            *lines, rest = self._buffer.splitlines(keepends=True)
            if rest.endswith((b"\n", b"\r")):
                lines.append(rest)
                rest = bytearray()
            self._buffer = rest
            for line in lines:
                if line.startswith(b"data:"):
                    self._event(bytes(line[5:]).strip())
        if len(self._buffer) > MAX_BODY_BYTES:
            self._reads = self.known = False
            self._buffer.clear()

    def last_byte(self) -> None:
        """The answer was read to its end. Raises `StreamCutError` if its last event never came."""
        if self.streamed and self._buffer.startswith(b"data:"):
            self._event(bytes(self._buffer[5:]).strip())
        if self.streamed and self.known and not self.complete:
            error = StreamCutError(
                "the stream ended before its last event, so the answer is not whole; ask again", connection_lost=True
            )
            self.end(error)
            raise error
        if self._reads and not self.streamed:
            body = _parsed(self._buffer)
            self._learn(body)
            if self.wants_content:
                self._show(content.OUTPUT, content.answered(body))
        self.complete = True
        self.end(None)

    def end(self, error: BaseException | None, *, collected: bool = False) -> None:
        """It is over: `error` says why, if it broke or was given up. Once; further calls do nothing."""
        operation, self._operation = self._operation, None
        if operation is None:
            return
        self.ended_at = waiters.now()
        if error is not None and not self.complete:
            self.error = error
            self.verdict = classify(error) if isinstance(error, Exception) else Verdict(Kind.CANCELLED)
        self._buffer.clear()
        operation.has_ended(self, collected=collected)

    def given_up(self) -> None:
        """Nobody reads the answer any more."""
        self.end(None if self.complete else GeneratorExit())

    def collected(self) -> None:
        """`given_up`, from a finaliser."""
        self.end(GeneratorExit(), collected=True)

    def _event(self, payload: bytes) -> None:
        now = waiters.now()
        if self.first_chunk_at is None:
            self.first_chunk_at = now
        elif self.last_chunk_at is not None:
            self.gaps.append(now - self.last_chunk_at)
        self.last_chunk_at = now
        self.known = self.known or is_known_event(payload)
        if is_last_event(payload):
            self.complete = True
            self._look_for_error(payload)
        if any(word in payload for word in _USAGE):
            self._learn(_parsed(payload))

    def _show(self, name: str, text: str | None) -> None:
        if self.span is not None and text is not None:
            self.span.add_content(name, text)

    def _look_for_error(self, payload: bytes) -> None:
        """A stream that has begun well may end with a refusal or a failure."""
        self.verdict = judge_event(payload) or self.verdict
        if self.verdict is not None and self._operation is not None:
            self._operation.refused(self.verdict)

    def _heed(self, headers: Mapping[str, str]) -> None:
        self.limits = tuple(rate_limit_state(headers))
        if self._operation is not None and self._operation.span is not None:
            self._operation.span.limits_seen(headers)

    def _learn(self, body: object) -> None:
        usage = usage_of(body) or Usage(None, None, None)
        self.input_tokens = usage.input_tokens if usage.input_tokens is not None else self.input_tokens
        self.output_tokens = usage.output_tokens if usage.output_tokens is not None else self.output_tokens
        self.response_model = usage.model or self.response_model


def report_tokens(prompt: int, answer: int = 0) -> None:
    """Tell how many tokens this call really used, from within the call. One figure for both will do.

    For calls whose result does not carry its usage (`result.usage`, as the SDKs of OpenAI and Anthropic return it).
    What was reserved by `LLMTaskMeta.tokens` is then settled. Does nothing outside of a call in the queue.
    """
    check_tokens(prompt)
    check_tokens(answer)
    operation = current()
    if operation is not None:
        operation.tokens = Tokens(prompt, answer)


def sending(host: str, path: str) -> Sent | None:
    """A request is about to leave; None: it belongs to no call. Its `request_headers` are to go with it."""
    operation = current()
    return None if operation is None else operation.sending(host, path)


def _parsed(body: bytes | bytearray) -> object:
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(body)
    return None
