"""What telemetry costs a call: a table.

    python benchmarks/telemetry_cost.py            prints it
    python benchmarks/telemetry_cost.py --write    also puts it into docs/measured.md

The best of interleaved rounds in this one process. Without a configured SDK is measured first, since that
cannot be undone. Nothing is exported: an exporter's own cost is its own, and in its own thread.
"""

from __future__ import annotations

import asyncio
import functools
import os
import sys
import tracemalloc
from pathlib import Path
from typing import Any

os.environ["PYDANTIC_DISABLE_PLUGINS"] = "__all__"  # Logfire's would import the SDK

from measure import WAITERS, Line, Scenario, at_once, awaited, best_of, machine, nothing, put_into

from llmq import LLMQueue, LLMTaskMeta, RuntimeEnv, Settings, Telemetry
from llmq.telemetry import SECONDS_BUCKETS

DOCS = Path(__file__).parent.parent / "docs" / "measured.md"
SLOTS, CALLS = 64, 2_000
META = LLMTaskMeta("features_3", "m", "service-1", "request-1")
BARE, NO_SDK, BY_HAND = (
    "queue, telemetry off (bare)",
    "on, no SDK",
    "bare, one span and four records by hand in the call",
)
METRICS, SPANS, LOGFIRE = "on, SDK metrics", "on, SDK metrics and spans", "on, Logfire (nothing sent)"
UNSET = "on, SDK imported and not set up"
NO_ATTEMPTS = "the same with attempts=False"


def submitting(queue: LLMQueue) -> Any:
    """A call through a queue."""
    return functools.partial(queue.submit, nothing, meta=META)


def waiting(queue: LLMQueue) -> Scenario:
    """10,000 calls at once, each of which holds its slot for one turn of the loop."""
    return at_once(functools.partial(queue.submit, functools.partial(asyncio.sleep, 0), meta=META))


async def measured(queues: dict[str, LLMQueue], others: dict[str, Any] | None = None) -> dict[str, tuple[float, float]]:
    """Microseconds a call, alone and of 10,000 at once."""
    calls = {name: submitting(queue) for name, queue in queues.items()} | (others or {})
    alone = await best_of({name: awaited(call, CALLS) for name, call in calls.items()}, CALLS)
    contended = await best_of({name: waiting(queue) for name, queue in queues.items()}, WAITERS)
    return {name: (alone[name], contended.get(name, float("nan"))) for name in alone}


async def without_sdk() -> dict[str, tuple[float, float]]:
    """Flag off, bare, and on with nobody who could listen."""
    assert "opentelemetry.sdk" not in sys.modules
    RuntimeEnv.reset()
    RuntimeEnv.initialize(Settings(llm_queue_enabled=False))
    import llmq

    off = {"flag off": functools.partial(llmq.submit, nothing, meta=META)}
    queues = {BARE: LLMQueue(SLOTS, telemetry=None), NO_SDK: LLMQueue(SLOTS, telemetry=Telemetry())}
    return await measured(queues, off)


def sdk_queues() -> dict[str, LLMQueue]:
    """With metrics, and with spans too."""
    tracers, meters = providers()
    from opentelemetry.trace import NoOpTracerProvider

    return {
        BARE: LLMQueue(SLOTS, telemetry=None),
        UNSET: LLMQueue(SLOTS, telemetry=Telemetry()),
        METRICS: LLMQueue(SLOTS, telemetry=Telemetry(tracer_provider=NoOpTracerProvider(), meter_provider=meters)),
        SPANS: LLMQueue(SLOTS, telemetry=Telemetry(tracer_provider=tracers, meter_provider=providers()[1])),
        NO_ATTEMPTS: LLMQueue(
            SLOTS, telemetry=Telemetry(tracer_provider=tracers, meter_provider=providers()[1], attempts=False)
        ),
    }


def providers() -> tuple[Any, Any]:
    """SDK providers that keep nothing."""
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

    tracers = TracerProvider()
    tracers.add_span_processor(SpanProcessor())
    return tracers, MeterProvider([InMemoryMetricReader()])


def by_hand() -> Any:
    """What somebody would write into their own call: a span around it, and four histograms."""
    tracers, meters = providers()
    tracer, meter = tracers.get_tracer("hand"), meters.get_meter("hand")
    histograms = [
        meter.create_histogram(f"h{number}", "s", explicit_bucket_boundaries_advisory=SECONDS_BUCKETS)
        for number in range(4)
    ]
    attributes = {"queue": "q", "stage": "features", "plateau": 3, "model_name": "m", "outcome": "ok"}

    async def call() -> None:
        with tracer.start_as_current_span("call") as span:
            span.set_attributes(attributes)
            await nothing()
        for histogram in histograms:
            histogram.record(0.001, attributes)

    return call


async def memory_of_a_waiter() -> float:
    """Bytes that a waiting `submit` with spans and metrics costs beyond its task."""

    async def parked() -> None:
        await asyncio.get_running_loop().create_future()

    async def bytes_each(call: Any) -> float:
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        tasks = [asyncio.create_task(call()) for _ in range(WAITERS)]
        await asyncio.sleep(0)
        found = (tracemalloc.get_traced_memory()[0] - before) / WAITERS
        tracemalloc.stop()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return found

    tracers, meters = providers()
    queue = LLMQueue(1, telemetry=Telemetry(tracer_provider=tracers, meter_provider=meters))
    async with queue.slot():
        with_queue = await bytes_each(submitting(queue))
    return with_queue - await bytes_each(parked)


async def main() -> str:
    """Measure, and write the table."""
    first = await without_sdk()
    queues = sdk_queues()
    second = await measured(queues, {BY_HAND: functools.partial(queues[BARE].submit, by_hand(), meta=META)})
    memory = await memory_of_a_waiter()
    import logfire

    logfire.configure(send_to_logfire=False, console=False)
    third = await measured({BARE: LLMQueue(SLOTS, telemetry=None), LOGFIRE: LLMQueue(SLOTS, telemetry=Telemetry())})
    no_sdk = first[NO_SDK][0] - first[BARE][0]
    by_hand_us = second[BY_HAND][0] - second[BARE][0]
    ratios = {name: (second[name][0] - second[BARE][0]) / by_hand_us for name in (METRICS, SPANS, NO_ATTEMPTS)}
    bounds = [
        Line("no SDK, over the bare queue", f"{no_sdk:.2f} µs", "3 µs", no_sdk <= 3),
        *(
            Line(
                f"{name.removeprefix('on, ')}, over the bare queue, to the same by hand",
                f"{ratio:.2f} x",
                "1.3 x",
                ratio <= 1.3,
            )
            for name, ratio in ratios.items()
        ),
        Line(
            "memory of a waiting `submit` with metrics and spans, beyond its task",
            f"{memory:,.0f} B",
            "2,048 B",
            memory < 2048,
        ),
    ]
    rows = [
        f"| {name} | {alone:.2f} | {'-' if contended != contended else f'{contended:.2f}'} |"
        for name, (alone, contended) in {
            **first,
            **{k: v for k, v in second.items() if k != BARE},
            LOGFIRE: third[LOGFIRE],
        }.items()
    ]
    return "\n".join(
        [
            f"`make bench-tables` on {machine()}, best of interleaved rounds:",
            "",
            "| what | found | bound | holds |",
            "|---|---|---|---|",
            *map(str, bounds),
            "",
            "| `submit` | one after the other, µs | 10,000 tasks on 64 slots, µs |",
            "|---|---|---|",
            *rows,
        ]
    )


if __name__ == "__main__":
    text = asyncio.run(main())
    print(text)
    if "--write" in sys.argv:
        put_into(DOCS, "make bench", text)
