import functools

import anyio
import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from llmq import LLMQueue, LLMTaskMeta, Retry
from llmq.errors import ProviderError
from llmq.telemetry import MAX_VALUES, SECONDS_BUCKETS, Telemetry, stage_attributes

pytestmark = pytest.mark.anyio


class Captured:
    """A queue whose spans and metrics stay in memory."""

    def __init__(self, limit=1, **options):
        self.exporter = InMemorySpanExporter()
        self.reader = InMemoryMetricReader()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        telemetry = Telemetry("q", tracer_provider=self.tracers, meter_provider=MeterProvider([self.reader]))
        self.queue = LLMQueue(limit, telemetry=telemetry, **options)

    def spans(self):
        return {span.context.span_id: span for span in self.exporter.get_finished_spans()}

    def tree(self):
        """(name, parent's name, outcome or status) of each span, in order of start."""
        spans = self.spans()
        rows = sorted(spans.values(), key=lambda s: s.start_time)
        return [
            (s.name, spans[s.parent.span_id].name if s.parent and s.parent.span_id in spans else None) for s in rows
        ]

    def points(self, name):
        """{attributes: value, or (count, sum) for a histogram}."""
        found = {}
        data = self.reader.get_metrics_data()
        for metric in [m for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics]:
            if metric.name == name:
                for point in metric.data.data_points:
                    key = tuple(sorted(point.attributes.items()))
                    found[key] = point.value if hasattr(point, "value") else (point.count, round(point.sum, 3))
        return found


async def sleep(seconds=1.0):
    await anyio.sleep(seconds)


META = LLMTaskMeta("features_3", "m", "service-1", "request-1")


async def test_a_plain_call_is_a_span_over_its_attempt():
    captured = Captured()
    await captured.queue.submit(sleep, meta=META)
    assert captured.tree() == [("llm_queue.submit", None), ("chat m", "llm_queue.submit")]
    operation, attempt = sorted(captured.spans().values(), key=lambda s: s.start_time)
    assert dict(operation.attributes) == {
        "stage": "features",
        "plateau": 3,
        "model_name": "m",
        "service_id": "service-1",
        "request_id": "request-1",
        "attempts": 1,
        "wait_seconds": 0.0,
        "outcome": "ok",
    }
    assert dict(attempt.attributes) == {"gen_ai.operation.name": "chat", "gen_ai.request.model": "m"}
    assert attempt.kind is trace.SpanKind.CLIENT


async def test_metrics_of_a_plain_and_a_waiting_call():
    captured = Captured()
    async with anyio.create_task_group() as group:
        for _ in range(2):
            group.start_soon(functools.partial(captured.queue.submit, sleep, meta=META))
        await anyio.sleep(0.5)
        base = (("model_name", "m"), ("plateau", 3), ("queue", "q"), ("stage", "features"))
        assert captured.points("llm_queue_inflight") == {base: 1}, "calls in flight, not free slots"
    ok = tuple(sorted([*base, ("outcome", "ok")]))
    assert captured.points("llm_queue_inflight") == {base: 0}
    assert captured.points("llm_queue_submitted") == {base: 2}
    assert captured.points("llm_queue_completed") == {ok: 2}
    assert captured.points("llm_queue_wait") == {ok: (2, 1.0)}
    assert captured.points("llm_queue_duration") == {ok: (2, 3.0)}


async def test_a_retried_refusal_is_one_operation_of_two_attempts():
    captured = Captured()
    calls = []

    async def refused_once():
        calls.append(1)
        if len(calls) == 1:
            raise ProviderError("slow down", status_code=429, headers={"retry-after": "2"}, body={"type": "requests"})

    await captured.queue.submit(refused_once, meta=LLMTaskMeta(model_name="m"), retry=Retry(2))
    assert captured.tree() == [
        ("llm_queue.submit", None),
        ("chat m", "llm_queue.submit"),
        ("chat m", "llm_queue.submit"),
    ]
    operation, first, second = sorted(captured.spans().values(), key=lambda s: s.start_time)
    assert (operation.attributes["attempts"], operation.attributes["outcome"]) == (2, "ok")
    assert first.attributes["http.response.status_code"] == 429
    assert first.attributes["error.type"] == "ProviderError"
    assert first.attributes["llm_queue.retry_after_seconds"] == 2.0
    assert second.attributes["http.request.resend_count"] == 1
    refusal = (("limit_type", "requests"), ("model_name", "m"), ("queue", "q"), ("retry_after", True))
    assert captured.points("llm_queue_rate_limited") == {refusal: 1}
    assert list(captured.points("llm_queue_completed").values()) == [1]


async def test_a_cancelled_waiter_never_was_in_flight():
    captured = Captured()
    async with captured.queue.slot():
        with anyio.move_on_after(1):
            await captured.queue.submit(sleep)
    outcomes = {dict(key)["outcome"]: value for key, value in captured.points("llm_queue_completed").items()}
    assert outcomes == {"cancelled": 1, "ok": 1}
    assert list(captured.points("llm_queue_inflight").values()) == [0]
    assert captured.tree().count(("chat", "llm_queue.submit")) == 1


async def test_submitted_is_completed_and_nothing_is_in_flight_in_the_end():
    captured = Captured(3, request_timeout=1.2, queue_timeout=3)

    async def call(number):
        await anyio.sleep(number % 5 * 0.3)
        if number % 3 == 0:
            raise ValueError(number)

    async def one(number):
        with anyio.move_on_after(4 if number % 7 else 0.5):
            try:
                await captured.queue.submit(functools.partial(call, number))
            except (ValueError, TimeoutError):
                pass

    async with anyio.create_task_group() as group:
        for number in range(40):
            group.start_soon(one, number)
    assert list(captured.points("llm_queue_submitted").values()) == [40]
    assert sum(captured.points("llm_queue_completed").values()) == 40
    assert list(captured.points("llm_queue_inflight").values()) == [0]


async def test_the_callers_span_is_the_parent_and_ours_is_current_in_the_call():
    captured = Captured()
    tracer = captured.tracers.get_tracer("test")

    async def call():
        with tracer.start_as_current_span("inside"):
            await anyio.sleep(1)

    with tracer.start_as_current_span("outside"):
        await captured.queue.submit(call)
        assert trace.get_current_span().name == "outside", "ours is current no longer"
    assert dict(captured.tree())["llm_queue.submit"] == "outside"
    assert dict(captured.tree())["inside"] == "llm_queue.submit"


async def test_secrets_and_prompts_in_errors_go_nowhere():
    captured = Captured()
    secret = "sk-planted-0123456789"

    async def leak():
        raise ProviderError(f"bad key {secret}", status_code=401, body={"message": secret})

    with pytest.raises(ProviderError):
        await captured.queue.submit(leak, meta=META)
    exported = [span.to_json() for span in captured.exporter.get_finished_spans()]
    exported.append(captured.reader.get_metrics_data().to_json())
    assert len(exported) == 3
    assert not [text for text in exported if secret in text]
    assert secret not in repr(captured.queue.records())


async def test_ids_stay_off_metrics_and_stages_are_bounded():
    captured = Captured()
    for number in range(MAX_VALUES + 20):
        await captured.queue.submit(functools.partial(sleep, 0), meta=LLMTaskMeta(f"stage{number}", service_id="s1"))
    points = captured.points("llm_queue_submitted")
    assert len(points) == MAX_VALUES + 1
    assert points[(("queue", "q"), ("stage", "_other"))] == 20
    assert "s1" not in repr(points)


async def test_without_an_sdk_nothing_is_made(monkeypatch):
    import sys

    for name in [n for n in sys.modules if n.startswith("opentelemetry.sdk")]:
        monkeypatch.delitem(sys.modules, name)
    assert Telemetry().operation_started(META) is None


@pytest.mark.parametrize(
    ("stage", "attributes"),
    [
        ("descriptions", {"stage": "descriptions"}),
        ("features_3", {"stage": "features", "plateau": 3}),
        ("mapping_3_data", {"stage": "mapping", "plateau": 3, "set": "data"}),
        (None, {}),
    ],
)
async def test_stage_labels_are_taken_apart(stage, attributes):
    assert stage_attributes(stage) == attributes


async def test_buckets_double_from_10_ms():
    assert SECONDS_BUCKETS[0] == 0.01
    assert SECONDS_BUCKETS[13:] == pytest.approx((81.92, 163.84, 327.68, 655.36))


async def test_logfire_is_a_configuration_of_the_same_spans(anyio_backend_name):
    if anyio_backend_name == "trio":
        return  # the configuration is of the process; once is enough
    import subprocess
    import sys

    code = """
import asyncio, logfire
from logfire.testing import TestExporter, SimpleSpanProcessor
import llmq
exporter = TestExporter()
llmq.configure_logfire(send_to_logfire=False, additional_span_processors=[SimpleSpanProcessor(exporter)])
async def answer():
    return 1
asyncio.run(llmq.LLMQueue(1).submit(answer, meta=llmq.LLMTaskMeta(model_name="m")))
print(sorted(s["name"] for s in exporter.exported_spans_as_dict()))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert found.stdout.strip() == "['chat m', 'llm_queue.submit']", found.stderr
