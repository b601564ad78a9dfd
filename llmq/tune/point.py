"""One level, measured: what is kept of it and how it is computed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from llmq.ledger import Price
from llmq.records import AttemptRecord, OperationRecord, Records
from llmq.tune.limits import RateSeen, Separation, by_a_rate, rate_seen, separation
from llmq.tune.statistics import (
    BLOCKS,
    Interval,
    block_counts,
    block_sums,
    count_interval,
    overlap_seconds,
    percentile,
    percentile_interval,
    settled_from,
    wilson,
)
from llmq.words import number

_MOST_UNSETTLED = 0.25
_FAR_MORE = 3.0
CLIENT_CPU_SHARE = 0.85
CLIENT_LAG_SHARE = 0.1
ACHIEVED_SHARE = 0.9

QUANTILES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.975, 0.99, 0.995, 0.999, 1.0)
"""Of which `Point.service_quantiles` and `Point.response_quantiles` tell the times."""

Purpose = Literal["level", "between", "more", "drift", "burst"]


@dataclass(slots=True)
class Window:
    """When a level was measured, and how the client fared meanwhile. The last two are None in virtual time."""

    start: float
    end: float
    warm_up_seconds: float
    cpu_share: float | None = None
    loop_lag_p99: float | None = None


@dataclass(frozen=True, slots=True)
class Setting:
    """What is measured: calls at once, and how many may start a minute (None: as many as there are slots)."""

    level: int
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None

    @property
    def paced(self) -> bool:
        """Whether starts are spaced out in time."""
        return self.requests_per_minute is not None or self.tokens_per_minute is not None

    def __str__(self) -> str:
        return f"{self.level}{f' at {pace}' if (pace := self.pace) else ''}"

    @property
    def pace(self) -> str:
        """The pace in words; empty without one."""
        parts = []
        if self.requests_per_minute is not None:
            parts.append(f"{number(self.requests_per_minute, 4)} requests/min")
        if self.tokens_per_minute is not None:
            parts.append(f"{number(self.tokens_per_minute, 6)} tokens/min")
        return " and ".join(parts)


@dataclass(slots=True)
class Point:
    """One window at one setting. Times are seconds, rates per second, shares between 0 and 1; `*_low` and `*_high` are
    95 % intervals. None: not known.

    - `level`, `requests_per_minute`, `tokens_per_minute`: the setting, calls at once and pace. `offered_rate`: arrivals
      a second of an open loop; None in a closed one. `open_items`: how many items of a pipeline were open.
    - `order`: when it was measured, from 0. `purpose`: "level" for one that was asked for, "between" for one that the
      sweep added, "more" for another window of a known one, "drift" for the first level measured again last, "burst"
      for a window before a limit on a rate was known: on a bucket that may have been full; it is kept, not judged.
    - `window_seconds` measured, after `warm_up_seconds` that were discarded. `steady`: whether the second half of the
      window was like the first.
    - `succeeded`: calls that ended well, `retried` of them after a refusal or failure; `attempts` of any outcome;
      `refused` by the provider; `failed`: operations that failed in the end. `outcomes`: attempts by outcome,
      for pictures: ok, ok after retry, 429 requests (tokens, concurrency, unknown ...), 5xx, timeout, truncated, error.
    - `goodput`: successful calls a second (closed loop: batch means; see `count_interval`). `attempt_rate`: attempts.
    - `share_429` of the attempts and `error_share` of the operations (both Wilson). `refused_by`: what was limited,
      most often; `told_per_minute`: that limit, as the headers of refusals say. `over_rate`: set by `judged`, the share
      of attempts that a rate found elsewhere cannot sustain.
    - `in_flight`: time-weighted mean. `queued`: the same, of calls that waited for a slot.
    - `service_*`: slot to end, successful attempts. `wait_*`: submit to slot, operations. `response_*`: from the
      intended start to the end, operations that succeeded: in an open loop from the arrival that was planned, so that
      a stall is not omitted. `first_token_*`: to the first piece of a stream; `between_tokens_*`: (service - first
      token) / (output tokens - 1), for streams. Percentile intervals are distribution-free (order statistics).
    - `tokens_per_second*`: prompts and answers of successful calls. `cost`: USD, with the price of every model that was
      called.
    - `cpu_share` of one core and `loop_lag_p99` (the third longest of fewer than 200 looks) of this client; None in
      virtual time. `limited_by`: "client" or "pipeline" where the window says nothing about the provider.
    - `ok_blocks`: successful calls in each of equal parts of the window, from which intervals and bootstraps come.
    - `rate`: what refusals by a rate tell of it, `separation`: whether refusals depend on what is in flight
      (`llmq.tune.limits`). `longest_hold_seconds`: the longest Retry-After.
    - `service_quantiles`, `response_quantiles`: at `QUANTILES`.
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
    goodput_low: float
    goodput_high: float
    attempt_rate: float
    share_429: float
    share_429_low: float
    share_429_high: float
    error_share: float
    error_share_low: float
    error_share_high: float
    in_flight: float
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    offered_rate: float | None = None
    open_items: int | None = None
    steady: bool = True
    retried: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    refused_by: str | None = None
    told_per_minute: float | None = None
    queued: float = 0.0
    service_mean: float | None = None
    service_p50: float | None = None
    service_p50_low: float | None = None
    service_p50_high: float | None = None
    service_p95: float | None = None
    service_p95_low: float | None = None
    service_p95_high: float | None = None
    service_p99: float | None = None
    wait_p50: float | None = None
    wait_p95: float | None = None
    response_p50: float | None = None
    response_p95: float | None = None
    response_p95_high: float | None = None
    first_token_p50: float | None = None
    first_token_p95: float | None = None
    between_tokens_p50: float | None = None
    between_tokens_p95: float | None = None
    tokens_per_second: float | None = None
    tokens_per_second_low: float | None = None
    tokens_per_second_high: float | None = None
    cost: float | None = None
    cpu_share: float | None = None
    loop_lag_p99: float | None = None
    limited_by: str | None = None
    over_rate: float = 0.0
    longest_hold_seconds: float = 0.0
    ok_blocks: tuple[int, ...] = ()
    service_quantiles: tuple[float, ...] = ()
    response_quantiles: tuple[float, ...] = ()
    rate: RateSeen | None = None
    separation: Separation | None = None

    @property
    def setting(self) -> Setting:
        """What was measured."""
        return Setting(self.level, self.requests_per_minute, self.tokens_per_minute)

    @property
    def goodput_error(self) -> float:
        """Half of the 95 % interval of goodput, as of a normal distribution: its standard error."""
        return (self.goodput_high - self.goodput_low) / (2 * 1.96)


def measure(
    setting: Setting,
    records: Records,
    window: Window,
    *,
    order: int = 0,
    purpose: Purpose = "level",
    offered_rate: float | None = None,
    open_items: int | None = None,
    responses: Sequence[tuple[float, float]] = (),
    told: Mapping[str, float] | None = None,
    prices: Mapping[str, Price] | None = None,
) -> Point:
    """A window's point from what its queue recorded. Pure.

    Whatever ended inside the window counts; what ran across its edges counts for `in_flight` only. `responses`:
    of an open loop, when each call ended and how long that was after its intended start. `told`: limits by what they
    are of, as headers say.
    """
    attempts = [a for a in records.attempts if _ended_inside(a, window) and a.outcome != "cancelled"]
    operations = [o for o in records.operations if _ended_inside(o, window) and o.outcome != "cancelled"]
    seconds = window.end - window.start
    a_second = 1.0 / seconds if seconds > 0 else 0.0  # the work may have ended before the window began
    good = [a for a in attempts if a.outcome == "ok"]
    service = [a.service_seconds for a in good if a.service_seconds is not None]
    waits = [o.wait_seconds for o in operations]
    took = [s for at, s in responses if window.start < at <= window.end] or [
        o.duration_seconds for o in operations if o.outcome == "ok"
    ]
    refusals = [a for a in attempts if a.outcome == "rejected"]
    failed = sum(o.outcome != "ok" for o in operations)
    share, errors = wilson(len(refusals), len(attempts)), wilson(failed, len(operations))
    blocks = block_counts([a.ended_at for a in good], window.start, window.end) if seconds > 0 else ()
    goodput = count_interval(blocks)
    first_tokens = [a.first_chunk_seconds for a in good if a.first_chunk_seconds is not None]
    between = [gap for a in good if (gap := _between_tokens(a)) is not None]
    p50, p95 = percentile_interval(service, 0.5), percentile_interval(service, 0.95)
    response_p95 = percentile_interval(took, 0.95)
    tokens = _tokens(good, window)
    point = Point(
        level=setting.level,
        order=order,
        purpose=purpose,
        window_seconds=seconds,
        warm_up_seconds=window.warm_up_seconds,
        succeeded=len(good),
        attempts=len(attempts),
        refused=len(refusals),
        failed=failed,
        goodput=len(good) * a_second,
        goodput_low=goodput.low * a_second,
        goodput_high=goodput.high * a_second if good else 0.0,
        attempt_rate=len(attempts) * a_second,
        share_429=len(refusals) / len(attempts) if attempts else 0.0,
        share_429_low=share.low,
        share_429_high=share.high,
        error_share=failed / len(operations) if operations else 0.0,
        error_share_low=errors.low,
        error_share_high=errors.high,
        in_flight=_mean_at_once([(a.started_at, a.ended_at) for a in records.attempts], window),
        requests_per_minute=setting.requests_per_minute,
        tokens_per_minute=setting.tokens_per_minute,
        offered_rate=offered_rate,
        open_items=open_items,
        retried=sum(a.attempt > 1 for a in good),
        outcomes=dict(Counter(map(_outcome, attempts))),
        refused_by=_most_common([a.limit_type or "unknown" for a in refusals]),
        told_per_minute=(told or {}).get(_most_common([a.limit_type or "unknown" for a in refusals]) or ""),
        queued=_mean_at_once([(a.submitted_at, a.started_at or a.ended_at) for a in records.attempts], window),
        service_mean=sum(service) / len(service) if service else None,
        service_p50=percentile(service, 0.5),
        service_p50_low=p50.low if p50 else None,
        service_p50_high=p50.high if p50 else None,
        service_p95=percentile(service, 0.95),
        service_p95_low=p95.low if p95 else None,
        service_p95_high=p95.high if p95 else None,
        service_p99=percentile(service, 0.99),
        wait_p50=percentile(waits, 0.5),
        wait_p95=percentile(waits, 0.95),
        response_p50=percentile(took, 0.5),
        response_p95=percentile(took, 0.95),
        response_p95_high=response_p95.high if response_p95 else None,
        first_token_p50=percentile(first_tokens, 0.5),
        first_token_p95=percentile(first_tokens, 0.95),
        between_tokens_p50=percentile(between, 0.5),
        between_tokens_p95=percentile(between, 0.95),
        tokens_per_second=tokens[0] * a_second if tokens else None,
        tokens_per_second_low=tokens[1].low * a_second if tokens else None,
        tokens_per_second_high=tokens[1].high * a_second if tokens else None,
        cost=_cost(attempts, prices or {}),
        cpu_share=window.cpu_share,
        loop_lag_p99=window.loop_lag_p99,
        longest_hold_seconds=max((a.retry_after_seconds or 0.0 for a in refusals), default=0.0),
        ok_blocks=blocks,
        service_quantiles=_quantiles(service),
        response_quantiles=_quantiles(took),
    )
    point.limited_by = _limited_by(point)
    if refusals:
        # The first calls come all at once, and in what order they arrive is not known: the warm-up tells no rate.
        started = [
            a for a in records.attempts if a.started_at is not None and window.start <= a.started_at <= window.end
        ]
        point.separation = separation(started)
        point.rate = rate_seen(started) if any(map(by_a_rate, refusals)) else None
    return point


def settled_part(records: Records, window: Window, *, paced: bool = False) -> tuple[Window, bool]:
    """The window without what had not settled at its beginning, and whether the halves of what is left are alike.

    What the series itself shows is left out (`settled_from`); but no more than a quarter of the window that was refused
    more than the rest: an emptied bucket soon has enough again, so a limit has changed there. At a pace the series
    hardly shows what that bucket cost, so a beginning that was refused far more often than the rest is left out, too.
    """
    ends = [a.ended_at for a in records.attempts if a.outcome == "ok"]
    refused = [
        a.ended_at
        for a in records.attempts
        if a.outcome == "rejected" and by_a_rate(a) and window.start < a.ended_at <= window.end
    ]
    seconds = window.end - window.start
    if seconds <= 0:
        return window, True
    cut = settled_from(block_counts(ends, window.start, window.end)) * seconds / BLOCKS
    if cut > _MOST_UNSETTLED * seconds and _times_as_often(refused, window, window.start + cut) > 1:
        cut = 0.0
    early = [at for at in refused if at <= window.start + _MOST_UNSETTLED * seconds]
    if paced and early and _times_as_often(refused, window, max(early)) >= _FAR_MORE:
        cut = max(cut, max(early) - window.start)
    if cut > 0:
        window = replace(window, start=window.start + cut, warm_up_seconds=window.warm_up_seconds + cut)
    middle = (window.start + window.end) / 2
    halves = [
        block_counts(ends, *edges, blocks=BLOCKS // 2) for edges in ((window.start, middle), (middle, window.end))
    ]
    (first, second), (a, b) = map(sum, halves), map(count_interval, halves)
    return window, abs(first - second) <= 1.5 * math.hypot((a.high - a.low) / 2, (b.high - b.low) / 2)


def _times_as_often(refused: Sequence[float], window: Window, moment: float) -> float:
    """How many times as often something was refused before a moment as after it."""
    before = sum(at <= moment for at in refused)
    after = len(refused) - before
    if after == 0:
        return math.inf if before else 1.0
    return (before / (moment - window.start)) / (after / (window.end - moment))


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
    # So does a pace, on purpose, and so do arrivals of an open loop.
    if point.setting.paced or point.offered_rate is not None:
        return None
    if point.in_flight + point.queued < ACHIEVED_SHARE * point.level and not point.refused:
        return "pipeline"
    return None


def _ended_inside(record: AttemptRecord | OperationRecord, window: Window) -> bool:
    return window.start < record.ended_at <= window.end


def _mean_at_once(spans: Iterable[tuple[float | None, float]], window: Window) -> float:
    known = [(start, end) for start, end in spans if start is not None]
    seconds = window.end - window.start
    return overlap_seconds(known, window.start, window.end) / seconds if seconds > 0 else 0.0


def _outcome(attempt: AttemptRecord) -> str:
    """The outcome as pictures tell it."""
    match attempt.outcome:
        case "ok":
            return "ok after retry" if attempt.attempt > 1 else "ok"
        case "rejected":
            return f"429 {attempt.limit_type or 'unknown'}"
        case "error" if attempt.error_type == "StreamCutError":
            return "truncated"
        case "error" if attempt.status_code is not None and attempt.status_code >= 500:
            return "5xx"
        case other:
            return other


def _between_tokens(attempt: AttemptRecord) -> float | None:
    """Mean time between the tokens of a stream, after the first."""
    service, first, tokens = attempt.service_seconds, attempt.first_chunk_seconds, attempt.output_tokens
    if service is None or first is None or tokens is None or tokens < 2:
        return None
    return max(0.0, service - first) / (tokens - 1)


def _tokens(good: Sequence[AttemptRecord], window: Window) -> tuple[float, Interval] | None:
    """How many tokens a window brought, and the interval of that; None where no call told any."""
    known = [a for a in good if a.output_tokens is not None]
    if not known or window.end <= window.start:
        return None
    tokens = [(a.input_tokens or 0) + (a.output_tokens or 0) for a in known]
    return sum(tokens), count_interval(block_sums([a.ended_at for a in known], tokens, window.start, window.end))


def _cost(attempts: Sequence[AttemptRecord], prices: Mapping[str, Price]) -> float | None:
    """USD of what was used; None where no call told its tokens, or a model has no price."""
    used = [a for a in attempts if a.output_tokens is not None or a.input_tokens is not None]
    models = {a.model_name or a.response_model or "" for a in used}
    if not used or not models <= prices.keys():
        return None
    return sum(
        prices[a.model_name or a.response_model or ""].cost_usd(a.input_tokens or 0, a.output_tokens or 0) for a in used
    )


def _quantiles(values: Sequence[float]) -> tuple[float, ...]:
    ordered = sorted(values)
    n = len(ordered)
    return tuple(ordered[max(0, min(n, -int(-share * n // 1)) - 1)] for share in QUANTILES) if ordered else ()


def _most_common(words: list[str]) -> str | None:
    return Counter(words).most_common(1)[0][0] if words else None
