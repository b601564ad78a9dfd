"""Spans and metrics of the queue. The only file that knows OpenTelemetry or Logfire.

The library speaks the OpenTelemetry API; what is exported where is the user's configuration of the SDK, of which
Logfire is one (`configure_logfire`). As long as nobody has imported the SDK nobody can have configured it, and
every method here returns at once.

Metric attributes are bounded: `features_3` reports stage `features` and plateau 3, and past `MAX_VALUES` values
an attribute says `_other`. Ids, prompts and messages of exceptions never become attributes of a metric; spans
carry the ids, never prompts or messages.
"""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

from llmq.core import LLMTaskMeta
from llmq.records import AttemptRecord, OperationRecord

if TYPE_CHECKING:
    from contextvars import Token

    from opentelemetry.context import Context
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import Span, TracerProvider

SECONDS_BUCKETS = tuple(0.01 * 2**power for power in range(17))
"""0.01 to 655.36 s, doubling: the GenAI buckets and three more, since queued calls outlive the standard."""

MAX_VALUES = 100
"""Distinct values of one metric attribute; further ones become `_other`."""

_STAGE = re.compile(r"^(?P<stage>[a-z]+)_(?P<plateau>\d{1,4})(?:_(?P<set>[a-z]+))?$")

Attributes = dict[str, str | int]


def stage_attributes(stage: str | None) -> Attributes:
    """Bounded attributes of a stage label.

    >>> stage_attributes("mapping_3_data")
    {'stage': 'mapping', 'plateau': 3, 'set': 'data'}
    """
    if stage is None:
        return {}
    match = _STAGE.match(stage)
    if match is None:
        return {"stage": stage}
    found: Attributes = {"stage": match["stage"], "plateau": int(match["plateau"])}
    if match["set"]:
        found["set"] = match["set"]
    return found


class Telemetry:
    """The queue's instruments. `tracer_provider` and `meter_provider` default to the global ones."""

    def __init__(
        self,
        queue_name: str = "llmq",
        *,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
    ) -> None:
        self.queue_name = queue_name
        self._providers = (tracer_provider, meter_provider)
        self._instruments: _Instruments | None = None

    def operation_started(self, meta: LLMTaskMeta) -> OperationSpan | None:
        """Count a submitted call and open its span, which is the current one until `detach`."""
        instruments = self._active()
        return None if instruments is None else OperationSpan(instruments, meta)

    def _active(self) -> _Instruments | None:
        if self._instruments is None and (any(self._providers) or "opentelemetry.sdk" in sys.modules):
            self._instruments = _Instruments(self.queue_name, *self._providers)
        return self._instruments


class OperationSpan:
    """One operation's span and counts, and those of its attempts."""

    __slots__ = ("_attempt_span", "_attributes", "_in_flight", "_instruments", "_meta", "_span", "_token")

    def __init__(self, instruments: _Instruments, meta: LLMTaskMeta) -> None:
        self._instruments = instruments
        self._meta = meta
        self._attributes = instruments.attributes(meta)
        self._attempt_span: Span | None = None
        self._in_flight = False
        self._token: Token[Context] | None = None
        instruments.submitted.add(1, self._attributes)
        self._span = instruments.start_operation(meta)

    def attach(self) -> None:
        """Make the span the current one of this task."""
        self._token = self._instruments.attach(self._span)

    def detach(self) -> None:
        """Undo `attach`, in the same task."""
        if self._token is not None:
            self._instruments.detach(self._token)
            self._token = None

    def attempt_started(self, attempt: int) -> None:
        """A slot was got: the call is in flight."""
        self._instruments.inflight.add(1, self._attributes)
        self._in_flight = True
        self._attempt_span = self._instruments.start_attempt(self._meta, self._span, attempt)

    def attempt_ended(self, record: AttemptRecord) -> None:
        """The attempt ended, or its caller gave up waiting."""
        instruments = self._instruments
        if self._in_flight:
            instruments.inflight.add(-1, self._attributes)
            self._in_flight = False
        instruments.wait.record(record.wait_seconds, {**self._attributes, "outcome": record.outcome})
        if record.limit_type is not None:
            instruments.rate_limited.add(
                1,
                {
                    "queue": instruments.queue_name,
                    "model_name": self._attributes.get("model_name", ""),
                    "limit_type": record.limit_type,
                    "retry_after": record.retry_after_seconds is not None,
                },
            )
        if self._attempt_span is not None:
            instruments.end_attempt(self._attempt_span, record)
            self._attempt_span = None

    def ended(self, record: OperationRecord) -> None:
        """The caller has its result."""
        attributes: Attributes = {**self._attributes, "outcome": record.outcome}
        self._instruments.completed.add(1, attributes)
        if record.error_type is not None:
            attributes["error.type"] = self._instruments.bounded("error.type", record.error_type)
        self._instruments.duration.record(record.duration_seconds, attributes)
        self._instruments.end_operation(self._span, record)


class _Instruments:
    """Everything that touches the OpenTelemetry API."""

    def __init__(
        self, queue_name: str, tracer_provider: TracerProvider | None, meter_provider: MeterProvider | None
    ) -> None:
        from opentelemetry import context, metrics, trace

        self._context, self._trace = context, trace
        self.queue_name = queue_name
        self._tracer = trace.get_tracer("llmq", tracer_provider=tracer_provider)
        meter = metrics.get_meter("llmq", meter_provider=meter_provider)
        self.inflight = meter.create_up_down_counter("llm_queue_inflight", "{call}", "Calls that hold a slot now")
        self.submitted = meter.create_counter("llm_queue_submitted", "{call}", "Calls submitted")
        self.completed = meter.create_counter("llm_queue_completed", "{call}", "Calls ended, by outcome")
        self.rate_limited = meter.create_counter("llm_queue_rate_limited", "{response}", "Refusals by the provider")
        self.wait = meter.create_histogram(
            "llm_queue_wait",
            "s",
            "From asking for a slot to having it",
            explicit_bucket_boundaries_advisory=SECONDS_BUCKETS,
        )
        self.duration = meter.create_histogram(
            "llm_queue_duration",
            "s",
            "From submit to result",
            explicit_bucket_boundaries_advisory=SECONDS_BUCKETS,
        )
        self._attributes: dict[tuple[str | None, str | None], Attributes] = {}
        self._seen: dict[str, set[str]] = {}

    def attributes(self, meta: LLMTaskMeta) -> Attributes:
        """The metric attributes of a call, made once per (stage, model)."""
        key = (meta.stage, meta.model_name)
        found = self._attributes.get(key)
        if found is None:
            found = {"queue": self.queue_name}
            for name, value in stage_attributes(meta.stage).items():
                found[name] = self.bounded(name, value) if isinstance(value, str) else min(value, MAX_VALUES)
            if meta.model_name is not None:
                found["model_name"] = self.bounded("model_name", meta.model_name)
            if len(self._attributes) < MAX_VALUES**2:
                self._attributes[key] = found
        return found

    def bounded(self, name: str, value: str) -> str:
        """The value itself, or `_other` once the attribute has `MAX_VALUES` values."""
        seen = self._seen.setdefault(name, set())
        if value in seen:
            return value
        if len(seen) >= MAX_VALUES:
            return "_other"
        seen.add(value)
        return value

    def start_operation(self, meta: LLMTaskMeta) -> Span:
        span = self._tracer.start_span("llm_queue.submit")
        if span.is_recording():
            ids = {
                "model_name": meta.model_name,
                "service_id": meta.service_id,
                "request_id": meta.request_id,
            }
            span.set_attributes({name: value for name, value in ids.items() if value is not None})
            span.set_attributes(stage_attributes(meta.stage))
        return span

    def start_attempt(self, meta: LLMTaskMeta, parent: Span, attempt: int) -> Span:
        parent.add_event("slot", {"attempt": attempt})
        span = self._tracer.start_span(
            f"chat {meta.model_name}" if meta.model_name else "chat",
            context=self._trace.set_span_in_context(parent),
            kind=self._trace.SpanKind.CLIENT,
        )
        span.set_attribute("gen_ai.operation.name", "chat")
        if meta.model_name is not None:
            span.set_attribute("gen_ai.request.model", meta.model_name)
        if attempt > 1:
            span.set_attribute("http.request.resend_count", attempt - 1)
        return span

    def end_attempt(self, span: Span, record: AttemptRecord) -> None:
        if record.status_code is not None:
            span.set_attribute("http.response.status_code", record.status_code)
        if record.retry_after_seconds is not None:
            span.set_attribute("llm_queue.retry_after_seconds", record.retry_after_seconds)
        self._end(span, record.error_type)

    def end_operation(self, span: Span, record: OperationRecord) -> None:
        span.set_attributes(
            {
                "attempts": record.attempts,
                "wait_seconds": record.wait_seconds,
                "outcome": record.outcome,
            }
        )
        self._end(span, record.error_type)

    def attach(self, span: Span) -> Token[Context]:
        return self._context.attach(self._trace.set_span_in_context(span))

    def detach(self, token: Token[Context]) -> None:
        self._context.detach(token)

    def _end(self, span: Span, error_type: str | None) -> None:
        if error_type is not None:
            span.set_attribute("error.type", error_type)
            span.set_status(self._trace.StatusCode.ERROR)
        span.end()


def configure_logfire(**options: Any) -> None:
    """Send llmq's spans and metrics to Logfire if a token is there, and nowhere if not.

    `options` go to `logfire.configure`. Needs the extra `logfire`.
    """
    import logfire

    logfire.configure(**{"send_to_logfire": "if-token-present", "console": False, **options})
