"""Every test starts in an empty folder, with no setting in the environment and no queue in the process."""

import os
import random
import shutil
from importlib.util import find_spec

import pytest
import trio.testing
from hypothesis import settings
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from llmq import LLMQueue, Telemetry
from llmq.runtime import RuntimeEnv
from llmq.virtual import VirtualLoop

settings.register_profile("llmq", deadline=None)
settings.load_profile("llmq")

BACKENDS = ["asyncio", "trio"]

PROGRAMS = {"test_receivers.py": ("prometheus", "promtool"), "test_browser.py": ("chromium", "chromedriver")}
MODULES = {"test_browser.py": ("jupyterlab", "selenium")}
NEEDS = {
    "test_receivers.py": "a Prometheus server; `make receivers` installs it",
    "test_browser.py": "JupyterLab and Chromium; `make test-browser` installs them",
}


def _can_run(name):
    return all(map(shutil.which, PROGRAMS.get(name, ()))) and all(map(find_spec, MODULES.get(name, ())))


collect_ignore = [name for name in NEEDS if not _can_run(name)]


def pytest_terminal_summary(terminalreporter):
    for name in collect_ignore:
        terminalreporter.write_line(f"NOT RUN: tests/{name} needs {NEEDS[name]}")


@pytest.fixture(params=BACKENDS)
def anyio_backend(request):
    """Virtual time on both backends."""
    if request.param == "asyncio":
        return "asyncio", {"loop_factory": VirtualLoop}
    return "trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}


@pytest.fixture(autouse=True)
def _hermetic(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random.seed(7)  # of the back-off
    for name in list(os.environ):
        if name.startswith("SA_") or name in ("OPENAI_API_KEY", "LOGFIRE_TOKEN"):
            monkeypatch.delenv(name)
    RuntimeEnv.reset()
    yield
    RuntimeEnv.reset()


class Captured:
    """A queue whose spans and metrics stay in memory."""

    def __init__(self, limit=1, *, service_id=False, attempts=True, content=False, **options):
        self.exporter = InMemorySpanExporter()
        self.reader = InMemoryMetricReader()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.tracers.get_tracer("test")
        self.meters = MeterProvider([self.reader])
        self.telemetry = Telemetry(
            "q",
            tracer_provider=self.tracers,
            meter_provider=self.meters,
            service_id=service_id,
            attempts=attempts,
            content=content,
        )
        self.queue = LLMQueue(limit, telemetry=self.telemetry, **options)

    def exported(self):
        """All that left, as text."""
        spans = [span.to_json() for span in self.exporter.get_finished_spans()]
        return "\n".join([*spans, self.reader.get_metrics_data().to_json()])

    def spans(self):
        """The finished spans in order of their start."""
        return sorted(self.exporter.get_finished_spans(), key=lambda span: span.start_time)

    def trees(self):
        """The finished spans as rows (depth, name, kind, attributes, events, status), each under its parent."""
        spans = self.spans()
        known = {span.context.span_id for span in spans}

        def row(span, depth):
            attributes = dict(span.attributes)
            status = span.status.status_code.name + (f": {span.status.description}" if span.status.description else "")
            events = [(event.name, dict(event.attributes)) for event in span.events]
            yield depth, span.name, span.kind.name, attributes, events, status
            for child in spans:
                if child.parent is not None and child.parent.span_id == span.context.span_id:
                    yield from row(child, depth + 1)

        roots = [span for span in spans if span.parent is None or span.parent.span_id not in known]
        return [each for root in roots for each in row(root, 0)]

    def names(self):
        """The trees, as indented names."""
        return ["  " * depth + name for depth, name, *_ in self.trees()]

    def metrics(self, *, idle=False):
        """{instrument: {"attribute=value ...": value, or (count, sum) of a histogram}}.

        Without depth and limit where those say that the queue is idle with its one slot, unless `idle`.
        """
        found = {}
        data = self.reader.get_metrics_data()
        if data is None:  # nothing has happened yet
            return {}
        for metric in [m for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics]:
            found[metric.name] = {
                " ".join(f"{name}={value}" for name, value in sorted(point.attributes.items())): (
                    point.value if hasattr(point, "value") else (point.count, round(point.sum, 6))
                )
                for point in metric.data.data_points
            }
        if not idle:
            if not any(found["llm_queue_depth"].values()):
                del found["llm_queue_depth"]
            if found["llm_queue_limit"] == {"queue=q": 1}:
                del found["llm_queue_limit"]
        return found


@pytest.fixture(scope="session")
def captured():
    return Captured
