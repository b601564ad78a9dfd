"""One level, measured: what is kept of it and how it is computed."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from llmq.records import AttemptRecord, OperationRecord, Records
from llmq.tune.statistics import overlap_seconds, percentile, wilson

CLIENT_CPU_SHARE = 0.85
CLIENT_LAG_SHARE = 0.1
ACHIEVED_SHARE = 0.9

RATES = ("requests", "tokens", "unknown")
"""Limits on a rate, and those that do not say what they limit."""

Purpose = Literal["level", "confirm", "drift", "burst"]


@dataclass(slots=True)
class Window:
    """When a level was measured, and how the client fared meanwhile. The last two are None in virtual time."""

    start: float
    end: float
    warm_up_seconds: float
    cpu_share: float | None = None
    loop_lag_p99: float | None = None


@dataclass(slots=True)
class Point:
    """One level of a sweep. Times are seconds, rates per second, shares between 0 and 1.

    `goodput`: successful calls a second. `attempt_rate`: attempts of any outcome a second. `share_429`: refusals of
    all attempts, with its 95 % interval (Wilson). `error_share`: operations that failed in the end, of all that
    ended. `in_flight`: time-weighted mean. Service times are of successful attempts only; waits are from submit to
    slot, of the operations that ended. `limited_by`: "client" or "pipeline" where the level says nothing about the
    provider. `purpose`: "level" for the first measurement, "confirm" for a longer one of the recommended level,
    "drift" for the last one, which shows whether the provider has changed; "burst" for one taken before a limit on a
    rate was known, on a bucket that may have been full: it is kept and not judged. `goodput_error`: standard error of
    goodput, from the spread of the service times (a renewal count, Cox 1962: relative error cv / sqrt(n)).
    `admitted` and `admitted_seconds`: calls let in between the first and the last refusal by a rate, and the time
    between these. Their quotient is the rate itself, since the bucket was empty at both ends (the policer estimator of
    BBR, Cardwell et al. 2016). `over_rate`: set by `judged`, the share of the attempts that such a rate cannot sustain.
    """

    level: int
    order: int
    purpose: Purpose
    window_seconds: float
    warm_up_seconds: float
    succeeded: int
    attempts: int
    refused: int
    failed: int
    goodput: float
    goodput_error: float
    attempt_rate: float
    share_429: float
    share_429_low: float
    share_429_high: float
    error_share: float
    refused_by: str | None
    in_flight: float
    service_mean: float | None
    service_p50: float | None
    service_p95: float | None
    wait_p50: float | None
    wait_p95: float | None
    cpu_share: float | None
    loop_lag_p99: float | None
    limited_by: str | None
    admitted: int = 0
    admitted_seconds: float = 0.0
    over_rate: float = 0.0


def measure(
    level: int,
    records: Records,
    window: Window,
    *,
    order: int = 0,
    purpose: Purpose = "level",
) -> Point:
    """A level's point from what its queue recorded. Pure.

    Whatever ended inside the window counts; what ran across its edges counts for `in_flight` only.
    """
    attempts = [a for a in records.attempts if _ended_inside(a, window) and a.outcome != "cancelled"]
    operations = [o for o in records.operations if _ended_inside(o, window) and o.outcome != "cancelled"]
    seconds = window.end - window.start
    a_second = 1.0 / seconds if seconds > 0 else 0.0  # the work may have ended before the window began
    service = [a.service_seconds for a in attempts if a.outcome == "ok" and a.service_seconds is not None]
    waits = [o.wait_seconds for o in operations]
    refusals = [a for a in attempts if a.outcome == "rejected"]
    failed = sum(o.outcome != "ok" for o in operations)
    low, high = wilson(len(refusals), len(attempts))
    spans = [(a.started_at, a.ended_at) for a in records.attempts if a.started_at is not None]
    point = Point(
        level=level,
        order=order,
        purpose=purpose,
        window_seconds=seconds,
        warm_up_seconds=window.warm_up_seconds,
        succeeded=len(service),
        attempts=len(attempts),
        refused=len(refusals),
        failed=failed,
        goodput=len(service) * a_second,
        goodput_error=spread(service) * math.sqrt(len(service)) * a_second,
        attempt_rate=len(attempts) * a_second,
        share_429=len(refusals) / len(attempts) if attempts else 0.0,
        share_429_low=low,
        share_429_high=high,
        error_share=failed / len(operations) if operations else 0.0,
        refused_by=_most_common([a.limit_type or "unknown" for a in refusals]),
        in_flight=overlap_seconds(spans, window.start, window.end) * a_second,
        service_mean=sum(service) / len(service) if service else None,
        service_p50=percentile(service, 0.5),
        service_p95=percentile(service, 0.95),
        wait_p50=percentile(waits, 0.5),
        wait_p95=percentile(waits, 0.95),
        cpu_share=window.cpu_share,
        loop_lag_p99=window.loop_lag_p99,
        limited_by=None,
    )
    point.limited_by = _limited_by(point)
    if point.refused_by in RATES:
        turned_away = [a.started_at for a in refusals if a.started_at is not None]
        let_in = [a.started_at for a in records.attempts if a.outcome != "rejected" and a.started_at is not None]
        first, last = min(turned_away), max(turned_away)  # by their start, since answers are read late by a busy client
        point.admitted = sum(first < at <= last for at in let_in)
        point.admitted_seconds = last - first
    return point


def _limited_by(point: Point) -> str | None:
    """`client`: this process is too slow to hold the level. `pipeline`: there is not enough to do to fill it."""
    if point.window_seconds <= 0:
        return "pipeline"
    if point.cpu_share is not None and point.cpu_share > CLIENT_CPU_SHARE:
        return "client"
    if (
        point.loop_lag_p99 is not None
        and point.service_p50 is not None
        and point.loop_lag_p99 > CLIENT_LAG_SHARE * point.service_p50
    ):
        return "client"
    # Refused calls leave their slots early and hold others back: then it is the provider that keeps a level unfilled.
    if point.in_flight < ACHIEVED_SHARE * point.level and not point.refused:
        return "pipeline"
    return None


def _ended_inside(record: AttemptRecord | OperationRecord, window: Window) -> bool:
    return window.start < record.ended_at <= window.end


def spread(values: list[float]) -> float:
    """Coefficient of variation; 1, as of an exponential, where there are too few to tell."""
    if len(values) < 2:
        return 1.0
    return statistics.stdev(values) / statistics.fmean(values)


def _most_common(words: list[str]) -> str | None:
    return Counter(words).most_common(1)[0][0] if words else None
