"""Spans and metrics of the queue. The only file that knows OpenTelemetry, Logfire or Prometheus.

The library speaks the OpenTelemetry API; what is exported where is the user's configuration of the SDK, of which
Logfire is one (`configure_logfire`) and a Prometheus endpoint another (`serve_metrics`). As long as nobody has
configured it every method here returns at once.

Rules
- An *operation* (`llm_queue.submit`) is what a caller submits; an *attempt* (`chat MODEL`) is one request to a provider
  where those are seen (`llmq.wrap`), else one call in a slot.
- Counters, depth and limits are counted by us and read when somebody collects them: they cost a call nothing. Only
  histograms are recorded call by call: the depth when a slot is asked for, all that a call's end tells after its slot
  was given back. Sets of attributes are made once.
- Metric attributes are bounded: `features_3` reports stage `features` and plateau 3, and past `MAX_VALUES` values
  an attribute says `_other`. Ids, prompts and messages of exceptions never become attributes of a metric
  (`service_id` may, where the user says so); spans carry the ids, never prompts or messages, unless `content` is set.
"""

from __future__ import annotations

import re
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from llmq.core import LLMTaskMeta
from llmq.dialects import rate_limit_state
from llmq.errors import ConfigError
from llmq.records import AttemptRecord, OperationRecord

if TYPE_CHECKING:
    from contextvars import Token

    from opentelemetry.context import Context
    from opentelemetry.metrics import CallbackOptions, Histogram, MeterProvider, Observation
    from opentelemetry.trace import Span, TracerProvider

SECONDS_BUCKETS = tuple(0.01 * 2**power for power in range(17))
"""0.01 to 655.36 s, doubling: the GenAI buckets and three more, since queued calls outlive the standard."""

DEPTH_BUCKETS = (0, *(2**power for power in range(18)))
"""Calls waiting: 0, and 1 to 131,072, doubling."""

TOKEN_BUCKETS = tuple(4**power for power in range(14))
"""Tokens of a call: 1 to 67,108,864, as the GenAI conventions have them."""

MAX_VALUES = 100
"""Distinct values of one metric attribute; further ones become `_other`."""

_STAGE = re.compile(r"^(?P<stage>[a-z]+)_(?P<plateau>\d{1,4})(?:_(?P<set>[a-z]+))?$")
_PROVIDERS = {
    "openai.azure.com": "azure.ai.openai",
    "openai.com": "openai",
    "anthropic.com": "anthropic",
    "groq.com": "groq",
    "googleapis.com": "gcp.gemini",
    "mistral.ai": "mistral_ai",
}

Attributes = dict[str, str | int]
_Readings = list[tuple[float, Attributes]]


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


def _is_configured() -> bool:
    """Whether somebody has set OpenTelemetry up for the process. Logfire imports the SDK long before it does."""
    trace, metrics = sys.modules.get("opentelemetry.trace"), sys.modules.get("opentelemetry.metrics")
    if trace is not None and not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return True
    return metrics is not None and type(metrics.get_meter_provider()).__name__ != "_ProxyMeterProvider"


def current_ids() -> dict[str, str]:
    """`trace_id` and `span_id` of the current span, in hex; nothing where there is none."""
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return {}
    found = trace.get_current_span().get_span_context()
    if not found.is_valid:
        return {}
    return {"trace_id": format(found.trace_id, "032x"), "span_id": format(found.span_id, "016x")}


def _operation_of(path: str) -> str:
    """What is asked for at a path, in the words of the GenAI conventions."""
    if path.endswith("/embeddings"):
        return "embeddings"
    if path.endswith(("generateContent", "GenerateContent")):
        return "generate_content"
    return "text_completion" if path.endswith("/completions") and not path.endswith("/chat/completions") else "chat"


class Gauges(Protocol):
    """What a queue tells when it is asked: its cap, caps of keys, and how many wait in each class."""

    def settle(self) -> None:
        """Count what ended where it could not be counted at once."""

    def gauges(self) -> tuple[dict[str, int], dict[str, int]]:
        """Limits by key ("" for all together), and waiting calls by class."""


class Telemetry:
    """The queue's instruments. `tracer_provider` and `meter_provider` default to the global ones.

    `service_id` adds that attribute to metrics: for runs of a few services. `attempts=False` leaves out all `gen_ai.*`
    spans and metrics: for when an instrumentation of the SDK itself makes them. `content` puts prompts and answers
    of seen requests on the attempts' spans, as JSON; answers that are streamed are left out, and keys always.
    """

    def __init__(
        self,
        queue_name: str = "llmq",
        *,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        service_id: bool = False,
        attempts: bool = True,
        content: bool = False,
    ) -> None:
        self.queue_name = queue_name
        self.service_id = service_id
        self.attempts = attempts
        self.content = content
        self.queues: weakref.WeakSet[Gauges] = weakref.WeakSet()
        self._providers = (tracer_provider, meter_provider)
        self._instruments: _Instruments | None = None
        self._guard = threading.Lock()

    def watch(self, queue: Gauges) -> None:
        """Tell of a queue's limits and depth, for as long as it lives."""
        self.queues.add(queue)

    def operation_started(self, meta: LLMTaskMeta) -> OperationSpan | None:
        """Count a submitted call and open its span. None: nobody listens."""
        instruments = self._instruments
        if instruments is None:
            if self._providers == (None, None) and not _is_configured():
                return None
            with self._guard:
                if self._instruments is None:
                    self._instruments = _Instruments(self, *self._providers)
                instruments = self._instruments
        return OperationSpan(instruments, meta)


class OperationSpan:
    """One operation's span and counts, and those of its attempts.

    The span itself is made when the first slot is there, with the time and the parent of the beginning: a waiting call
    costs no memory for one. It stays None where none is recorded.
    """

    __slots__ = (
        "_asked_ns",
        "_began_ns",
        "_depth",
        "_in_flight",
        "_instruments",
        "_meta",
        "_parent",
        "_series",
        "_slot_ns",
        "_span",
        "_token",
    )

    def __init__(self, instruments: _Instruments, meta: LLMTaskMeta) -> None:
        self._instruments = instruments
        self._meta = meta
        self._series = series = instruments.series_of(meta)
        self._in_flight = False
        self._token: Token[Context] | None = None
        self._span: Span | None = None
        self._parent: Context | None = None
        self._depth = self._asked_ns = self._slot_ns = self._began_ns = 0
        if instruments.spans:
            self._parent = instruments.current()
            self._began_ns = self._asked_ns = time.time_ns()
        with instruments.guard:
            series.submitted += 1

    def attach(self) -> None:
        """Make the span the current one of this task, once there is one."""
        if self._span is not None and self._token is None:
            self._token = self._instruments.attach(self._span)

    def detach(self) -> None:
        """Undo `attach`, in the same task."""
        token, self._token = self._token, None
        if token is not None:
            self._instruments.detach(token)

    def asked(self, depth: int, priority: str) -> None:
        """A slot was asked for, with `depth` calls waiting before."""
        instruments = self._instruments
        instruments.depth_at_entry.record(depth, instruments.of_class[priority])
        self._depth = depth
        if self._span is not None:
            self._asked_ns = time.time_ns()

    def got_slot(self, attempt: int, lag_seconds: float | None) -> None:
        """The call is in flight. `lag_seconds`: how late its loop woke it; None where it did not wait."""
        instruments = self._instruments
        with instruments.guard:
            self._series.in_flight += 1
        self._in_flight = True
        if lag_seconds is not None:
            instruments.loop_lag.record(lag_seconds)
        if not self._began_ns:
            return
        self._slot_ns = time.time_ns()
        span = self._have_span()
        if lag_seconds is not None and span is not None:
            span.add_event("queued", {"position": self._depth}, self._asked_ns)
            span.add_event("slot", {"attempt": attempt}, self._slot_ns)
            instruments.add_wait(span, self._asked_ns, self._slot_ns)

    def _gave_up_waiting(self) -> None:
        span = self._have_span()
        if span is not None:
            span.add_event("queued", {"position": self._depth}, self._asked_ns)
            self._instruments.add_wait(span, self._asked_ns, time.time_ns())

    def _have_span(self) -> Span | None:
        if self._span is None and self._began_ns:
            self._span = self._instruments.start_operation(self._meta, self._depth, self._parent, self._began_ns)
            self._parent = None
        return self._span

    def sending(self, host: str, path: str, resend: int) -> AttemptSpan | None:
        """A request leaves."""
        if not self._instruments.attempts:
            return None
        return AttemptSpan(self._instruments, self._meta, self._span, resend, host=host, path=path)

    def limits_seen(self, headers: Mapping[str, str]) -> None:
        """What a response told of the provider's limits."""
        states = rate_limit_state(headers)
        if states:
            model = self._series.model_attributes.get("model_name", "")
            for state in states:
                told = (time.monotonic(), state.limit, state.remaining)
                self._instruments.provider_limits[model, state.dimension] = told

    def left_slot(self, record: AttemptRecord) -> None:
        """The call is in flight no longer, or its caller gave up waiting."""
        instruments, series = self._instruments, self._series
        if self._in_flight:
            self._in_flight = False
            with instruments.guard:
                series.in_flight -= 1
        instruments.wait.record(record.wait_seconds, series.with_outcome(record.outcome))
        if record.started_at is None and record.wait_seconds > 0:
            self._gave_up_waiting()

    def attempt_ended(self, record: AttemptRecord, span: AttemptSpan | None = None, gaps: Iterable[float] = ()) -> None:
        """The attempt ended. `span`: of a request that was seen."""
        instruments, series = self._instruments, self._series
        if record.limit_type is not None:
            with instruments.guard:
                series.refused[record.limit_type, record.retry_after_seconds is not None] += 1
        if not instruments.attempts or record.started_at is None:
            return
        if span is None:
            span = AttemptSpan(instruments, self._meta, self._span, record.attempt - 1, start_ns=self._slot_ns)
        span.end(record, gaps)

    def retrying(self, delay_seconds: float, source: str) -> None:
        """Another attempt follows, after a delay that the provider (retry_after) or we (backoff) have set."""
        self._instruments.retry_delay.record(delay_seconds, self._instruments.of_source[source])

    def ended(self, record: OperationRecord) -> None:
        """The caller has its result."""
        instruments, series = self._instruments, self._series
        with instruments.guard:
            series.completed[record.outcome] += 1
        error_type = instruments.error_type(record.error_type)
        instruments.duration.record(record.duration_seconds, series.with_error(record.outcome, error_type))
        span = self._have_span()
        if span is not None:
            instruments.end_operation(span, record)


class AttemptSpan:
    """One attempt's client span, and its `gen_ai.*` figures."""

    __slots__ = ("_instruments", "_series", "_span", "request_headers", "wants_content")

    def __init__(
        self,
        instruments: _Instruments,
        meta: LLMTaskMeta,
        parent: Span | None,
        resend: int,
        *,
        host: str | None = None,
        path: str = "",
        start_ns: int | None = None,
    ) -> None:
        self._instruments = instruments
        self._series = instruments.requests_of(meta, host, path)
        self.request_headers: dict[str, str] = {}
        self.wants_content = False
        """Whether prompts and answers are to be recorded."""
        self._span: Span | None = None
        if parent is not None:
            self._span = instruments.start_attempt(self._series, parent, resend, start_ns)
            if host is not None:
                self.request_headers = instruments.headers_for(self._span)
                self.wants_content = instruments.content and self._span.is_recording()

    def end(self, record: AttemptRecord, gaps: Iterable[float] = ()) -> None:
        """The attempt ended. `gaps`: seconds from each piece of a streamed answer to the next."""
        assert record.service_seconds is not None
        instruments = self._instruments
        attributes = self._series.with_answer(record.response_model, instruments.error_type(record.error_type))
        instruments.request_duration.record(record.service_seconds, attributes)
        if record.first_chunk_seconds is not None:
            instruments.first_chunk.record(record.first_chunk_seconds, attributes)
            for gap in gaps:
                instruments.per_chunk.record(gap, attributes)
        for kind, tokens in (("input", record.input_tokens), ("output", record.output_tokens)):
            if tokens is not None:
                instruments.tokens.record(tokens, self._series.of_tokens(record.response_model, kind))
        if self._span is not None:
            instruments.end_attempt(self._span, record)

    def add_content(self, name: str, text: str) -> None:
        """Put a prompt or an answer on the span."""
        if self._span is not None:
            self._span.set_attribute(name, text)


class _Series:
    """The operations with one set of attributes."""

    __slots__ = (
        "_errors",
        "_outcomes",
        "attributes",
        "completed",
        "in_flight",
        "model_attributes",
        "refused",
        "submitted",
    )

    def __init__(self, attributes: Attributes) -> None:
        self.attributes = attributes
        self.model_attributes: Attributes = {
            name: attributes[name] for name in ("queue", "model_name") if name in attributes
        }
        self.submitted = self.in_flight = 0
        self.completed: Counter[str] = Counter()
        self.refused: Counter[tuple[str, bool]] = Counter()
        self._outcomes: dict[str, Attributes] = {}
        self._errors: dict[tuple[str, str | None], Attributes] = {}

    def with_outcome(self, outcome: str) -> Attributes:
        found = self._outcomes.get(outcome)
        if found is None:
            found = self._outcomes[outcome] = {**self.attributes, "outcome": outcome}
        return found

    def with_error(self, outcome: str, error_type: str | None) -> Attributes:
        found = self._errors.get((outcome, error_type))
        if found is None:
            found = {**self.attributes, "outcome": outcome}
            if error_type is not None:
                found["error.type"] = error_type
            self._errors[outcome, error_type] = found
        return found


class _Requests:
    """The attempts with one set of attributes."""

    __slots__ = ("_bounded", "_made", "attributes", "name")

    def __init__(self, attributes: Attributes, bounded: Callable[[str, str], str]) -> None:
        self.attributes = attributes
        self._bounded = bounded
        operation, model = attributes["gen_ai.operation.name"], attributes.get("gen_ai.request.model")
        self.name = f"{operation} {model}" if model else str(operation)
        self._made: dict[tuple[str | None, str, str | None], Attributes] = {}

    def with_answer(self, response_model: str | None, error_type: str | None) -> Attributes:
        return self._with(response_model, "error.type", error_type)

    def of_tokens(self, response_model: str | None, kind: str) -> Attributes:
        return self._with(response_model, "gen_ai.token.type", kind)

    def _with(self, response_model: str | None, name: str, value: str | None) -> Attributes:
        found = self._made.get((response_model, name, value))
        if found is None:
            found = dict(self.attributes)
            if response_model is not None:
                found["gen_ai.response.model"] = self._bounded("gen_ai.response.model", response_model)
            if value is not None:
                found[name] = value
            if len(self._made) < MAX_VALUES**2:
                self._made[response_model, name, value] = found
        return found


class _Instruments:
    """Everything that touches the OpenTelemetry API."""

    def __init__(
        self, telemetry: Telemetry, tracer_provider: TracerProvider | None, meter_provider: MeterProvider | None
    ) -> None:
        from opentelemetry import context, metrics, propagate, trace

        self._context, self._trace, self._propagate = context, trace, propagate
        self.guard = threading.Lock()
        self.queue_name = telemetry.queue_name
        self.attempts = telemetry.attempts
        self.content = telemetry.content
        self._by_service = telemetry.service_id
        self._queues = telemetry.queues
        self._series: dict[tuple[str | None, ...], _Series] = {}
        self._requests: dict[tuple[str | None, ...], _Requests] = {}
        self._seen: dict[str, set[str]] = {}
        self.provider_limits: dict[tuple[str | int, str], tuple[float, float | None, float | None]] = {}
        self.of_class: dict[str, Attributes] = {name: {"queue": self.queue_name, "priority": name} for name in _CLASSES}
        self.of_source: dict[str, Attributes] = {
            name: {"queue": self.queue_name, "source": name} for name in ("retry_after", "backoff")
        }
        self._tracer = trace.get_tracer("llmq", tracer_provider=tracer_provider)
        self._meter = meter = metrics.get_meter("llmq", meter_provider=meter_provider)
        self.wait = self._histogram("llm_queue_wait", "s", "From asking for a slot to having it")
        self.duration = self._histogram("llm_queue_duration", "s", "From submit to result")
        self.retry_delay = self._histogram("llm_queue_retry_delay", "s", "From a failed attempt to the next")
        self.loop_lag = self._histogram("llm_queue_loop_lag", "s", "How late a loop woke who had got a slot")
        self.depth_at_entry = self._histogram(
            "llm_queue_depth_at_entry", "{call}", "Calls waiting when one asked for a slot", DEPTH_BUCKETS
        )
        self.request_duration = self._histogram("gen_ai.client.operation.duration", "s", "Of one attempt")
        self.first_chunk = self._histogram(
            "gen_ai.client.operation.time_to_first_chunk", "s", "From sending to the first piece of a streamed answer"
        )
        self.per_chunk = self._histogram(
            "gen_ai.client.operation.time_per_output_chunk", "s", "From one piece of a streamed answer to the next"
        )
        self.tokens = self._histogram("gen_ai.client.token.usage", "{token}", "Used by one attempt", TOKEN_BUCKETS)
        up_down, gauge = meter.create_observable_up_down_counter, meter.create_observable_gauge
        counter = meter.create_observable_counter
        with _everyone_guard:
            everyone = _everyone_at(None if meter_provider is metrics.get_meter_provider() else meter_provider)
            everyone.append(self)
            first = len(everyone) == 1
        if not first:
            return  # the SDK drops the callbacks of whoever comes second; those of the first read all of us

        def summed(read: Callable[[_Instruments], _Readings]) -> Any:
            def callback(options: CallbackOptions) -> list[Observation]:
                total: dict[tuple[object, ...], tuple[float, Attributes]] = {}
                for value, attributes in (reading for each in list(everyone) for reading in read(each)):
                    key = (*attributes.items(),)
                    total[key] = (value + total.get(key, (0, {}))[0], attributes)
                return [metrics.Observation(*reading) for reading in total.values()]

            return [callback]

        def told(which: int) -> Any:
            def callback(options: CallbackOptions) -> list[Observation]:
                newest: dict[tuple[object, ...], tuple[float, float, Attributes]] = {}
                for at, value, attributes in (reading for each in list(everyone) for reading in each.told(which)):
                    key = (*attributes.items(),)
                    if key not in newest or newest[key][0] < at:
                        newest[key] = (at, value, attributes)
                return [metrics.Observation(value, attributes) for _, value, attributes in newest.values()]

            return [callback]

        up_down("llm_queue_inflight", summed(_Instruments._in_flight), "{call}", "Calls that hold a slot now")
        up_down("llm_queue_depth", summed(_Instruments._depth), "{call}", "Calls waiting now")
        counter("llm_queue_submitted", summed(_Instruments._submitted), "{call}", "Calls submitted")
        counter("llm_queue_completed", summed(_Instruments._completed), "{call}", "Calls ended, by outcome")
        counter("llm_queue_rate_limited", summed(_Instruments._refused), "{response}", "Refusals by the provider")
        gauge("llm_queue_limit", summed(_Instruments._limits), "{call}", "Calls at once, at most")
        for number, name in enumerate(("llm_queue_ratelimit_limit", "llm_queue_ratelimit_remaining")):
            gauge(name, told(number), "", "As the provider last told of its limit")

    def series_of(self, meta: LLMTaskMeta) -> _Series:
        """The series that a call counts in; looked up by what the call says, made once for what its attributes are."""
        key = (meta.stage, meta.model_name, meta.service_id if self._by_service else None)
        found = self._series.get(key)
        return self._new_series(meta, key) if found is None else found

    def requests_of(self, meta: LLMTaskMeta, host: str | None, path: str) -> _Requests:
        """The series that an attempt is recorded in."""
        key = (meta.model_name, host, _operation_of(path))
        found = self._requests.get(key)
        if found is None:
            attributes: Attributes = {"gen_ai.operation.name": key[2]}
            if meta.model_name is not None:
                attributes["gen_ai.request.model"] = self._bounded("model_name", meta.model_name)
            if host is not None:
                attributes["server.address"] = host = self._bounded("server.address", host)
                provider = next((name for end, name in _PROVIDERS.items() if host.endswith(end)), None)
                if provider is not None:
                    attributes["gen_ai.provider.name"] = provider
            found = _Requests(attributes, self._bounded)
            if len(self._requests) < MAX_VALUES**2:
                self._requests[key] = found
        return found

    @property
    def spans(self) -> bool:
        """Whether any are recorded."""
        return not isinstance(self._tracer, self._trace.NoOpTracer)

    def current(self) -> Context:
        """The context of the caller."""
        return self._context.get_current()

    def start_operation(self, meta: LLMTaskMeta, depth: int, parent: Context | None, began_ns: int) -> Span | None:
        told: Attributes = {**stage_attributes(meta.stage), "position_at_entry": depth}
        for name, value in zip(_SPAN_NAMES, (meta.model_name, meta.service_id, meta.request_id), strict=True):
            if value is not None:
                told[name] = value
        for name, value in meta.labels.items():
            told[f"label.{name}"] = value
        span = self._tracer.start_span("llm_queue.submit", parent, attributes=told, start_time=began_ns)
        return span if span.get_span_context().is_valid else None

    def add_wait(self, parent: Span, start_ns: int, end_ns: int) -> None:
        span = self._tracer.start_span(
            "llm_queue.wait", context=self._trace.set_span_in_context(parent), start_time=start_ns
        )
        span.end(end_ns)

    def start_attempt(self, series: _Requests, parent: Span, resend: int, start_ns: int | None) -> Span:
        attributes = series.attributes if resend < 1 else {**series.attributes, "http.request.resend_count": resend}
        return self._tracer.start_span(
            series.name,
            context=self._trace.set_span_in_context(parent),
            kind=self._trace.SpanKind.CLIENT,
            attributes=attributes,
            start_time=start_ns,
        )

    def headers_for(self, span: Span) -> dict[str, str]:
        """The headers that let a provider's own trace go on from a span (W3C traceparent). No baggage: it is not the
        provider's."""
        headers: dict[str, str] = {}
        self._propagate.inject(headers, context=self._trace.set_span_in_context(span, self._context.Context()))
        return headers

    def end_attempt(self, span: Span, record: AttemptRecord) -> None:
        if record.status_code is None and not record.seen and record.input_tokens is None:
            self._end(span, record.error_type)
            return
        found = {
            "http.response.status_code": record.status_code,
            "llm_queue.retry_after_seconds": record.retry_after_seconds,
            "llm_queue.limit_type": record.limit_type,
            "gen_ai.response.model": record.response_model,
            "gen_ai.usage.input_tokens": record.input_tokens,
            "gen_ai.usage.output_tokens": record.output_tokens,
        }
        span.set_attributes({name: value for name, value in found.items() if value is not None})
        self._end(span, record.error_type)

    def end_operation(self, span: Span, record: OperationRecord) -> None:
        span.set_attributes(
            {"attempts": record.attempts, "wait_seconds": record.wait_seconds, "outcome": record.outcome}
        )
        self._end(span, record.error_type)

    def attach(self, span: Span) -> Token[Context]:
        return self._context.attach(self._trace.set_span_in_context(span))

    def detach(self, token: Token[Context]) -> None:
        with suppress(ValueError):  # collected in another context
            token.var.reset(token)

    def _end(self, span: Span, error_type: str | None) -> None:
        if error_type is not None:
            span.set_attribute("error.type", error_type)
            span.set_status(self._trace.StatusCode.ERROR)
        span.end()

    def _histogram(self, name: str, unit: str, text: str, buckets: Iterable[float] = SECONDS_BUCKETS) -> Histogram:
        return self._meter.create_histogram(name, unit, text, explicit_bucket_boundaries_advisory=tuple(buckets))

    def _new_series(self, meta: LLMTaskMeta, key: tuple[str | None, ...]) -> _Series:
        attributes: Attributes = {"queue": self.queue_name}
        for name, value in stage_attributes(meta.stage).items():
            attributes[name] = self._bounded(name, value) if isinstance(value, str) else min(value, MAX_VALUES)
        for name, text in (("model_name", meta.model_name), ("service_id", key[2])):
            if text is not None:
                attributes[name] = self._bounded(name, text)
        folded = (*(f"{name}={value}" for name, value in attributes.items()),)
        with self.guard:
            found = self._series.setdefault(folded, _Series(attributes))
            if len(self._series) < MAX_VALUES**2:
                self._series[key] = found
        return found

    def error_type(self, name: str | None) -> str | None:
        """The name, bounded."""
        return None if name is None else self._bounded("error.type", name)

    def _bounded(self, name: str, value: str) -> str:
        """The value itself, or `_other` once the attribute has `MAX_VALUES` values."""
        with self.guard:
            seen = self._seen.setdefault(name, set())
            if value in seen:
                return value
            if len(seen) >= MAX_VALUES:
                return "_other"
            seen.add(value)
            return value

    def _every_series(self) -> list[_Series]:
        for queue in list(self._queues):
            queue.settle()
        with self.guard:
            return list(dict.fromkeys(self._series.values()))

    def _in_flight(self) -> _Readings:
        return [(series.in_flight, series.attributes) for series in self._every_series()]

    def _submitted(self) -> _Readings:
        return [(series.submitted, series.attributes) for series in self._every_series()]

    def _completed(self) -> _Readings:
        return [
            (count, series.with_outcome(outcome))
            for series in self._every_series()
            for outcome, count in list(series.completed.items())
        ]

    def _refused(self) -> _Readings:
        total: Counter[tuple[str | int, str, bool]] = Counter()
        for series in self._every_series():
            for (limit_type, said), count in list(series.refused.items()):
                total[series.attributes.get("model_name", ""), limit_type, said] += count
        return [
            (count, {"queue": self.queue_name, "model_name": model, "limit_type": kind, "retry_after": said})
            for (model, kind, said), count in total.items()
        ]

    def _limits(self) -> _Readings:
        total: Counter[str] = Counter()
        for queue in list(self._queues):
            total.update(queue.gauges()[0])
        return [
            (limit, {"queue": self.queue_name, **({"key": self._bounded("key", key)} if key else {})})
            for key, limit in total.items()
        ]

    def _depth(self) -> _Readings:
        total = Counter(dict.fromkeys(_CLASSES, 0))
        for queue in list(self._queues):
            total.update(queue.gauges()[1])
        return [(waiting, self.of_class[name]) for name, waiting in total.items()]

    def told(self, which: int) -> list[tuple[float, float, Attributes]]:
        """The provider's limits (0) or what remains of them (1), and when it told that."""
        return [
            (at, value, {"model_name": model, "dimension": dimension})
            for (model, dimension), (at, *values) in list(self.provider_limits.items())
            if (value := values[which]) is not None
        ]


_SPAN_NAMES = ("model_name", "service_id", "request_id")
_CLASSES = ("urgent", "high", "normal", "low")
_everyone_guard = threading.Lock()
_everyone: weakref.WeakKeyDictionary[MeterProvider, list[_Instruments]] = weakref.WeakKeyDictionary()
_everyone_at_the_global: list[_Instruments] = []


def _everyone_at(provider: MeterProvider | None) -> list[_Instruments]:
    """All instruments that were made with a provider, in order; None: with the global one."""
    return _everyone_at_the_global if provider is None else _everyone.setdefault(provider, [])


def configure_logfire(*, metrics_port: int | None = None, **options: Any) -> int | None:
    """Send llmq's spans and metrics to Logfire if a token is there, and nowhere if not.

    `options` go to `logfire.configure`. With `metrics_port` Prometheus finds the metrics there too, as by
    `serve_metrics`; the port is returned. Needs the extra `logfire`. Raises `ConfigError`.
    """
    try:
        import logfire
    except ImportError as error:
        raise ConfigError(f"{error.name} is not installed: pip install 'llmq-toolkit[logfire]'") from None

    port = None
    if metrics_port is not None:
        if "metrics" in options:
            raise ConfigError("metrics_port sets logfire's option metrics itself; give one of them")
        # Logfire asks for exponential histograms, at which the Prometheus exporter fails; views go for every reader.
        from opentelemetry.sdk.metrics.view import ExponentialBucketHistogramAggregation

        views = [
            view
            for view in logfire.MetricsOptions.DEFAULT_VIEWS
            if not isinstance(view._aggregation, ExponentialBucketHistogramAggregation)
        ]
        new_reader = _prometheus_reader()
        port = _listen(metrics_port, "127.0.0.1")
        options["metrics"] = logfire.MetricsOptions(additional_readers=[new_reader()], views=views)
    logfire.configure(**{"send_to_logfire": "if-token-present", "console": False, **options})
    return port


def serve_metrics(port: int = 9464, host: str = "127.0.0.1") -> int:
    """Let Prometheus scrape this process at `http://HOST:PORT/metrics`; port 0 takes a free one. Returns the port.

    Sets OpenTelemetry's metrics up for the process, if nobody has: else add `PrometheusMetricReader()` to the readers
    of your own MeterProvider. Needs the extra `prometheus`. Raises `ConfigError`.
    """
    from opentelemetry import metrics

    new_reader = _prometheus_reader()
    from opentelemetry.sdk.metrics import MeterProvider

    if not type(metrics.get_meter_provider()).__name__.startswith("_Proxy"):
        raise ConfigError(
            "OpenTelemetry's metrics are set up already; add PrometheusMetricReader() to the readers of that "
            "MeterProvider, or use configure_logfire(metrics_port=...)"
        )
    port = _listen(port, host)  # first, so that a port that is taken leaves everything as it was
    metrics.set_meter_provider(MeterProvider([new_reader()]))
    return port


def _prometheus_reader() -> Callable[[], Any]:
    """What makes a reader for Prometheus; made, it is in the process's registry."""
    try:
        from opentelemetry.exporter.prometheus import PrometheusMetricReader
    except ImportError as error:
        raise ConfigError(f"{error.name} is not installed: pip install 'llmq-toolkit[prometheus]'") from None
    return PrometheusMetricReader


def _listen(port: int, host: str) -> int:
    from prometheus_client import start_http_server

    try:
        server, _ = start_http_server(port, host)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}") from None
    return int(server.server_port)
