"""What leaves a process, and where it goes: OTLP over HTTP, Logfire with and without a token, nothing with no SDK."""

import asyncio
import gzip
import json
import os
import subprocess
import sys
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import pytest
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

import llmq
from llmq import LLMQueue, LLMTaskMeta, Retry
from llmq.errors import ProviderError
from llmq.telemetry import Telemetry
from llmq.testing import serve_provider

TOKEN = "pylf_v1_us_planted0123456789"

UNITS = {
    "llm_queue_inflight": "{call}",
    "llm_queue_submitted": "{call}",
    "llm_queue_completed": "{call}",
    "llm_queue_depth": "{call}",
    "llm_queue_limit": "{call}",
    "llm_queue_depth_at_entry": "{call}",
    "llm_queue_wait": "s",
    "llm_queue_duration": "s",
    "llm_queue_rate_limited": "{response}",
    "llm_queue_retry_delay": "s",
    "llm_queue_ratelimit_remaining": "",
    "llm_queue_ratelimit_limit": "",
    "llm_queue_loop_lag": "s",
    "gen_ai.client.operation.duration": "s",
    "gen_ai.client.operation.time_to_first_chunk": "s",
    "gen_ai.client.operation.time_per_output_chunk": "s",
    "gen_ai.client.token.usage": "{token}",
}
"""Every instrument there is."""


class Receiver:
    """Takes OTLP over HTTP, and what Logfire asks for on start."""

    def __init__(self):
        received = self.received = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                encoding = self.headers.get("content-encoding", "identity")
                unpack = {"gzip": gzip.decompress, "deflate": zlib.decompress, "identity": bytes}[encoding]
                received.append((self.path, self.headers, unpack(body)))
                self.answer(b"")

            def do_GET(self):
                received.append((self.path, self.headers, b""))
                self.answer(json.dumps({"project_name": "p", "project_url": "http://127.0.0.1/p"}).encode())

            def answer(self, body):
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.thread.join(30)
        self.server.server_close()

    def spans(self):
        """By id, from all requests."""
        requests = [ExportTraceServiceRequest.FromString(b) for path, _, b in self.received if path == "/v1/traces"]
        scopes = [scope for r in requests for resource in r.resource_spans for scope in resource.scope_spans]
        return {span.span_id: span for scope in scopes for span in scope.spans}

    def metrics(self):
        """{name: unit} of llmq's own."""
        requests = [ExportMetricsServiceRequest.FromString(b) for path, _, b in self.received if path == "/v1/metrics"]
        scopes = [scope for r in requests for resource in r.resource_metrics for scope in resource.scope_metrics]
        return {m.name: m.unit for scope in scopes if scope.scope.name == "llmq" for m in scope.metrics}


def tree(spans):
    """(name, parent's name) in order of start."""
    rows = sorted(spans.values(), key=lambda span: span.start_time_unix_nano)
    return [(s.name, spans[s.parent_span_id].name if s.parent_span_id in spans else None) for s in rows]


async def every_kind(url, queue):
    """A streamed call, one that waits, one that is refused once."""
    refused = []

    async def refuse_once():
        if not refused:
            refused.append(1)
            raise ProviderError("slow down", status_code=429, headers={"retry-after": "0.05"})

    async with httpx2.AsyncClient(base_url=url, transport=llmq.AsyncTransport(), timeout=30) as client:

        async def stream():
            messages = [{"role": "user", "content": "hello"}]
            options = {"stream": True, "stream_options": {"include_usage": True}}
            return await client.post("chat/completions", json={"model": "m", "messages": messages, **options})

        meta = LLMTaskMeta("features_3", "m")
        async with asyncio.TaskGroup() as group:
            group.create_task(queue.submit(stream, meta=meta))
            group.create_task(queue.submit(stream, meta=meta))
    await queue.submit(refuse_once, meta=meta, retry=Retry(2))


def test_an_otlp_receiver_gets_every_span_and_metric():
    with Receiver() as receiver, serve_provider(latency_seconds=0.05, requests_per_minute=60_000) as provider:
        tracers = TracerProvider()
        tracers.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(f"{receiver.url}/v1/traces")))
        reader = PeriodicExportingMetricReader(OTLPMetricExporter(f"{receiver.url}/v1/metrics"), float("inf"))
        meters = MeterProvider([reader])
        telemetry = Telemetry("q", tracer_provider=tracers, meter_provider=meters)
        try:
            with tracers.get_tracer("test").start_as_current_span("caller"):
                asyncio.run(every_kind(provider.url, LLMQueue(1, telemetry=telemetry)))
            assert meters.force_flush()
        finally:
            meters.shutdown()
            tracers.shutdown()
    operation, attempt = ("llm_queue.submit", "caller"), ("chat m", "llm_queue.submit")
    assert sorted(tree(receiver.spans())) == sorted(
        [("caller", None), *[operation] * 3, *[attempt] * 4, ("llm_queue.wait", "llm_queue.submit")], key=str
    )
    assert len({span.trace_id for span in receiver.spans().values()}) == 1
    assert receiver.metrics() == UNITS


def run(code, *arguments, env=None):
    """A fresh process; what it prints."""
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **(env or {})},
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


SUBMIT = """
import asyncio, sys
import llmq
async def answer():
    await asyncio.sleep(0.01)
    return 1
def work():
    asyncio.run(llmq.LLMQueue(1).submit(answer, meta=llmq.LLMTaskMeta(model_name="m")))
"""

WATCHED = """
import sys
connected = []
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        connected.append((event, arguments[1:]))
sys.addaudithook(watch)
"""

LOGFIRE = f"""{WATCHED}{SUBMIT}
import logfire
llmq.configure_logfire(advanced=logfire.AdvancedOptions(base_url=sys.argv[1]))
work()
logfire.shutdown()
print(connected)
"""


def test_logfire_with_a_token_gets_the_same_spans_and_metrics():
    with Receiver() as receiver:
        run(LOGFIRE, receiver.url, env={"LOGFIRE_TOKEN": TOKEN})
    finished = {key: span for key, span in receiver.spans().items() if not is_pending(span)}
    assert tree(finished) == [("llm_queue.submit", None), ("chat m", "llm_queue.submit")]
    assert receiver.metrics().items() <= UNITS.items()
    assert {"llm_queue_submitted", "llm_queue_wait", "gen_ai.client.operation.duration"} <= receiver.metrics().keys()
    assert {headers["Authorization"] for path, headers, _ in receiver.received if path == "/v1/traces"} == {TOKEN}


def is_pending(span):
    """Logfire tells of a span already when it starts."""
    kinds = [pair.value.string_value for pair in span.attributes if pair.key == "logfire.span_type"]
    return kinds == ["pending_span"]


def test_logfire_without_a_token_sends_nothing_anywhere():
    with Receiver() as receiver:
        assert run(LOGFIRE, receiver.url) == "[]"
    assert receiver.received == []


SCRAPE = """
import urllib.request
def scrape(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        return answer.read().decode()
"""


def test_logfire_and_prometheus_together():
    text = run(f"""{SUBMIT}{SCRAPE}
port = llmq.configure_logfire(send_to_logfire=False, metrics_port=0)
work()
print(scrape(port))
try:
    llmq.configure_logfire(metrics_port=0, metrics=False)
except llmq.ConfigError:
    print("refused")
""")
    assert 'llm_queue_completed_total{model_name="m"' in text
    assert 'llm_queue_duration_seconds_bucket{le="0.02",model_name="m"' in text, "buckets as we want them"
    assert text.endswith("refused")


def test_serve_metrics_wants_to_be_the_one_who_sets_metrics_up():
    said = run(f"""{SUBMIT}{SCRAPE}
import socket
with socket.socket() as taken:
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    try:
        llmq.serve_metrics(taken.getsockname()[1])
    except llmq.ConfigError as error:
        print(error)
port = llmq.serve_metrics(0)
work()
assert "llm_queue_submitted_total" in scrape(port), "a taken port has left everything as it was"
try:
    llmq.serve_metrics(0)
except llmq.ConfigError as error:
    print(error)
""")
    first, second = said.splitlines()
    assert "cannot listen on 127.0.0.1" in first
    assert "are set up already" in second


@pytest.mark.parametrize(
    ("module", "call", "extra"),
    [
        ("opentelemetry.exporter.prometheus", "serve_metrics(0)", "prometheus"),
        ("prometheus_client", "serve_metrics(0)", "prometheus"),
        ("logfire", "configure_logfire()", "logfire"),
        ("opentelemetry.exporter.prometheus", "configure_logfire(metrics_port=0)", "prometheus"),
    ],
)
def test_what_is_not_installed_is_named(module, call, extra):
    said = run(f"""
import sys
sys.modules[{module!r}] = None
import llmq
try:
    llmq.{call}
except llmq.ConfigError as error:
    print(error)
""")
    assert f"llmq-toolkit[{extra}]" in said
    assert module in said


def test_without_an_sdk_there_is_no_span_and_no_import():
    left = run(f"{SUBMIT}work()\nprint([name for name in sys.modules if name.startswith('opentelemetry')])")
    assert left == "[]", "where nothing of OpenTelemetry is imported nobody makes a span"
