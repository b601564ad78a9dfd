"""How wrong a percentile is that is read from a histogram, and one that is read from the records.

python benchmarks/percentiles.py     log-normal calls of sigma 0.8; prints the table of docs/telemetry.md

Since the buckets double, the error depends on where in its bucket a percentile lies, and comes again with each doubling
of the median: so the medians go from 2 to 4 s in 8 steps, and the worst one counts.
"""

from __future__ import annotations

import asyncio
import math
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
from opentelemetry.sdk.metrics import Histogram, MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.metrics.view import ExponentialBucketHistogramAggregation

from llmq import LLMQueue
from llmq.telemetry import SECONDS_BUCKETS, Telemetry
from llmq.virtual import VirtualLoop

CALLS = 4000
SIGMA = 0.8
STEPS = 8
SHARES = (0.5, 0.9, 0.95, 0.99)
EXPONENTIAL = {Histogram: ExponentialBucketHistogramAggregation()}


def sample(median: float, calls: int = CALLS) -> list[float]:
    """Seconds of calls, always the same."""
    draw = random.Random(7)
    return [median * math.exp(draw.gauss(0, SIGMA)) for _ in range(calls)]


def run(seconds: Sequence[float], readers: Sequence[Any]) -> pd.DataFrame:
    """Send calls that take so long through a real queue, in virtual time. Returns the records of their attempts."""
    telemetry = Telemetry(meter_provider=MeterProvider(readers))
    queue = LLMQueue(64, telemetry=telemetry, max_records=len(seconds))

    async def main() -> None:
        async for outcome in queue.map(asyncio.sleep, seconds):
            outcome.unwrap()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())
    return queue.records().attempts.to_pandas()


def point_of(reader: InMemoryMetricReader, name: str = "gen_ai.client.operation.duration") -> Any:
    """The only point of a histogram."""
    data = reader.get_metrics_data()
    assert data is not None
    metrics = [m for r in data.resource_metrics for scope in r.scope_metrics for m in scope.metrics]
    (point,) = next(metric for metric in metrics if metric.name == name).data.data_points
    return point


def linear(point: Any, share: float) -> float:
    """Prometheus's histogram_quantile on classic buckets."""
    rank, below, lower = share * point.count, 0, 0.0
    for count, upper in zip(point.bucket_counts, point.explicit_bounds, strict=False):
        if below + count >= rank:
            return lower + (upper - lower) * (rank - below) / count
        below, lower = below + count, upper
    return lower


def exponential(point: Any, share: float) -> float:
    """The same on exponential buckets, between whose edges it goes by the logarithm."""
    base, rank, below = 2**2**-point.scale, share * point.count, point.zero_count
    for index, count in enumerate(point.positive.bucket_counts):
        if count and below + count >= rank:
            return base ** (point.positive.offset + index + (rank - below) / count)
        below += count
    raise AssertionError("no such rank")


Errors = dict[str, dict[float, list[float]]]


def errors() -> Errors:
    """{how it was read: {percentile: relative errors over the medians}}."""
    ways = ("queue.records()", "exponential histogram", "doubling buckets")
    found: Errors = {way: {share: [] for share in SHARES} for way in ways}
    for step in range(STEPS):
        seconds = sample(2 * 2 ** (step / STEPS))
        classic, fine = InMemoryMetricReader(), InMemoryMetricReader(preferred_aggregation=EXPONENTIAL)
        records = run(seconds, [classic, fine])
        true = pd.Series(seconds)
        points = point_of(classic), point_of(fine)
        assert points[0].explicit_bounds == SECONDS_BUCKETS
        reads: list[Callable[[float], float]] = [
            lambda share, records=records: float(records["service_seconds"].quantile(share)),
            lambda share, point=points[1]: exponential(point, share),
            lambda share, point=points[0]: linear(point, share),
        ]
        for way, read in zip(ways, reads, strict=True):
            for share in SHARES:
                right = float(true.quantile(share))
                found[way][share].append(read(share) / right - 1)
    return found


def table(found: Errors) -> str:
    """In Markdown: the worst error, and the mean of its size."""
    head = " | ".join(f"p{share * 100:.0f}" for share in SHARES)
    lines = [f"| read from | {head} |", "|---" * (len(SHARES) + 1) + "|"]
    for way, by_share in found.items():
        cells = [
            f"{max(map(abs, each)):.1%} ({statistics.fmean(map(abs, each)):.1%})".replace("%", " %")
            for each in by_share.values()
        ]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(errors()))
