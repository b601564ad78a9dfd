"""From a recording, a model of the provider: how long calls take, and which limits were met.

Nothing is taken for known that the recording does not show. Pure functions.

- *Rates.* At a refusal that follows an admission (an *onset*) a bucket has just run dry, and a fixed window is used up.
  So what was let in between the first and the last onset, over the time between them, is the rate itself (the policer
  estimator of BBR, Cardwell et al. 2016). What was let in before the first onset, less what the rate brought meanwhile,
  is the bucket's depth, or less where the bucket was not full when the recording began.
- *Rates told in headers.* In a bucket the time to the reset falls in proportion to what remains: reset = (depth -
  remaining) / rate. A line through both gives rate and depth. Where the reset rises with what remains, the headers
  tell of a fixed window, whose length is the longest reset seen. Where neither can be seen, it is a minute.
- *Concurrency.* Calls are let in below C in flight and refused at C. Where a 429 does not say what it limits, it is
  one on concurrency if in-flight tells the refused from the others, and one on a rate if it does not.
- *A server that queues* works on s calls and lets others wait in order of arrival. Then a call's own time is from the
  departure that made place for it to its own departure. With a wrong s parts of the times of others come into it, so
  the right one has the least spread. It is claimed only if that is clearly less than the spread of the whole times.
- *The client is late*, too: a timer wakes it when its processor has time. llmq's queue spreads starts after a hold of
  H seconds by gaps of min(1 s, H) / level, each counted from when the last start really was. H is of the newest
  refusal: the time until the refused call came back, jitter included, and 50 ms; its Retry-After, if it did not. So
  what such a gap is longer than that, with a slot free and a call waiting, is how late the client woke.
- *The client is busy*: it takes a moment to make an answer of what has arrived, and starts nothing meanwhile. So of the
  starts that were due before a refusal was told, those due early were made and those due in the last moment were not.
  That moment is where the two are told apart best. Both matter where refusals are counted, as they say how many calls
  are sent between one that is refused and the news of it.
- A fixed window is modelled as a bucket that holds a window's worth: equal in the long run, not within one window.
"""

from __future__ import annotations

import heapq
import itertools
import math
import statistics
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from llmq.dialects import RateLimitState
from llmq.records import AttemptRecord
from llmq.tune.limits import RATES
from llmq.tune.statistics import percentile
from llmq.tune.trace import Trace
from llmq.words import number

Source = Literal["met", "told", "given"]
"""Refusals show it, headers told it, or the user said "what if"."""
RateKind = Literal["requests", "tokens"]

FEWEST_ADMITTED = 10
MOST_MIXED = 0.1
CLEARLY_LESS = 0.9
CLEARLY_FASTER = 3.0
LEAST_SHARE_OF_MEDIAN = 0.25
LEAST_SPREAD_SHARE = 1e-3
"""Of the median time: below, times are equal but for rounding."""
AGREES = 0.1
ENOUGH_WARM = 4
LONGEST_WINDOW_SECONDS = 300.0
LONGEST_SPREAD_SECONDS = 1.0
COME_BACK_SECONDS = 0.05
"""Both as of `llmq.queue`."""
EARLY_SHARE = 0.2
LATEST_SECONDS = 0.03
FEWEST_DUE = 30
MOST_MADE = 0.25
_HELD_BACK = ("cancelled", "queue_full", "dropped")


@dataclass(frozen=True, slots=True)
class Sample:
    """One admitted attempt: how long the provider took (seconds), its tokens, and `status_code` None or of a failure.

    `failed` without a status: it was cut, or timed out.
    """

    seconds: float
    tokens: int
    failed: bool = False
    status_code: int | None = None


@dataclass(frozen=True, slots=True)
class RateLimit:
    """A bucket of `depth` requests or tokens, refilled at `per_minute`. `says`: the `limit_type` of its refusals."""

    kind: RateKind
    per_minute: float
    depth: float
    source: Source
    evidence: str
    says: str

    def __str__(self) -> str:
        return (
            f"{number(self.per_minute, 4)} {self.kind} per minute, {number(self.depth)} at once "
            f"({_SOURCES[self.source]}{self.evidence})"
        )


@dataclass(frozen=True, slots=True)
class ConcurrencyLimit:
    """At most `calls` at once, more are refused."""

    calls: int
    source: Source
    evidence: str
    says: str

    def __str__(self) -> str:
        return f"{self.calls} calls at once, more are refused ({_SOURCES[self.source]}{self.evidence})"


@dataclass(frozen=True, slots=True)
class ServerSlots:
    """The server works on `slots` calls at once, the others wait there."""

    slots: int
    evidence: str

    def __str__(self) -> str:
        return f"the server works on {self.slots} calls at once and lets others wait ({self.evidence})"


_SOURCES: dict[Source, str] = {"met": "met: ", "told": "told in headers: ", "given": "given"}

RetryAfter = Literal["none", "exact", "whole"] | float
"""What refusals say: nothing, the very wait, the wait in whole seconds, or always so many seconds."""


@dataclass(frozen=True, slots=True)
class ProviderModel:
    """What a recording shows of a provider. Times are seconds, rates calls a second.

    `samples`: admitted attempts by stage, in order. `refusal_seconds`: how long refused ones took. `highest_rate`:
    admitted calls a second; `highest_in_flight`: admitted calls at once; above these nothing is known of limits that
    were not met. `late_seconds`, `busy_seconds`: of the client, how late its timers were and how long it is at work on
    a refusal. `notes`: what was seen and could not be made use of.
    """

    samples: Mapping[str | None, tuple[Sample, ...]]
    refusal_seconds: tuple[float, ...]
    retry_after: RetryAfter
    rates: tuple[RateLimit, ...]
    concurrency: ConcurrencyLimit | None
    server_slots: ServerSlots | None
    highest_rate: float
    highest_in_flight: int
    late_seconds: float = 0.0
    busy_seconds: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def limits(self) -> tuple[RateLimit | ConcurrencyLimit | ServerSlots, ...]:
        """All that is known to limit calls."""
        return tuple(limit for limit in (*self.rates, self.concurrency, self.server_slots) if limit is not None)


def fit(trace: Trace) -> ProviderModel:
    """The model of the provider behind a recording. Of a trace in which nothing was admitted, one without samples."""
    calls = _Calls(trace.attempts)
    notes: list[str] = []
    concurrency = fit_concurrency(calls, notes)
    rates = fit_rates(calls, concurrency, notes)
    slots = fit_server_slots(calls, notes)
    dues = _dues(calls, trace.level)
    late_seconds = fit_late_seconds(dues)
    own_seconds = calls.seconds() if slots is None else _own_seconds(calls.spans(), slots.slots)
    return ProviderModel(
        _samples(calls.admitted, own_seconds),
        tuple(a.ended_at - _start(a) for a in calls.refused),
        _retry_after([a for a in calls.refused if a.limit_type != "concurrency"] or calls.refused),
        tuple(rates),
        concurrency,
        slots,
        _rate_seen(calls),
        max(calls.in_flight_at(calls.admitted), default=-1) + 1,
        late_seconds,
        fit_busy_seconds(dues, late_seconds),
        tuple(notes),
    )


class _Calls:
    """The attempts that got a slot, in order of their start, of equal ones the admitted first.

    Overload is a fault here, not a limit.
    """

    def __init__(self, attempts: Iterable[AttemptRecord]) -> None:
        started = [a for a in attempts if a.started_at is not None and a.outcome not in _HELD_BACK]
        self.all = sorted(started, key=lambda a: (_start(a), _is_refusal(a)))
        self.refused = [a for a in self.all if _is_refusal(a)]
        self.admitted = [a for a in self.all if not _is_refusal(a)]

    def spans(self) -> list[tuple[float, float]]:
        """Start and end of the admitted ones."""
        return [(_start(a), a.ended_at) for a in self.admitted]

    def seconds(self) -> list[float]:
        """How long the admitted ones took."""
        return [end - start for start, end in self.spans()]

    def in_flight_at(self, attempts: Iterable[AttemptRecord]) -> list[int]:
        """How many admitted calls ran when each of these started, itself not counted."""
        order = {id(attempt): place for place, attempt in enumerate(self.all)}
        admitted_before = [0]
        for attempt in self.all:
            admitted_before.append(admitted_before[-1] + (not _is_refusal(attempt)))
        ends = sorted(a.ended_at for a in self.admitted)
        return [max(0, admitted_before[order[id(a)]] - bisect_right(ends, _start(a))) for a in attempts]

    def most_in_flight_during(self, refused: Iterable[AttemptRecord]) -> list[int]:
        """The most admitted calls that ran while each of these was on its way: the provider decided then."""
        steps = sorted([(_start(a), 1) for a in self.admitted] + [(a.ended_at, -1) for a in self.admitted])
        times = [time for time, _ in steps]
        levels = list(itertools.accumulate(step for _, step in steps))
        found = []
        for attempt in refused:
            first, last = bisect_right(times, _start(attempt)), bisect_right(times, attempt.ended_at)
            found.append(max(levels[max(0, first - 1) : last], default=0))
        return found

    def onsets(self, says: Sequence[str]) -> list[AttemptRecord]:
        """Refusals of this kind that follow an admission, in order of start."""
        found = []
        for before, attempt in zip([None, *self.all], self.all, strict=False):
            if _is_refusal(attempt) and _says(attempt) in says and (before is None or not _is_refusal(before)):
                found.append(attempt)
        return found


def fit_concurrency(calls: _Calls, notes: list[str]) -> ConcurrencyLimit | None:
    """The limit on calls at once that was met, if one was."""
    for says in ("concurrency", "unknown"):
        refused = [a for a in calls.refused if _says(a) == says]
        if not refused:
            continue
        at_refusals, at_admissions = calls.most_in_flight_during(refused), calls.in_flight_at(calls.admitted)
        limit, mixed = _separated(at_refusals, at_admissions)
        evidence = f"{len(refused)} refusals, {mixed:.0%} of the calls on the wrong side of it"
        if says == "concurrency" or (limit >= 1 and mixed <= MOST_MIXED and not _is_steady(calls, says)):
            return ConcurrencyLimit(max(1, limit), "met", evidence, says)
    return None


def _separated(at_refusals: Sequence[int], at_admissions: Sequence[int]) -> tuple[int, float]:
    """The in-flight that best tells refusals (at or above) from admissions (below), and how badly it does, 0 to 1."""
    best, least = 1, math.inf
    for limit in range(1, max(at_refusals) + 1):
        early = sum(n < limit for n in at_refusals) / len(at_refusals)
        late = sum(n >= limit for n in at_admissions) / max(1, len(at_admissions))
        if early + late < least:
            best, least = limit, early + late
    return best, least / 2 if least < math.inf else 1.0


def _is_steady(calls: _Calls, says: str) -> bool:
    """Whether admissions at onsets lie on a line within a call, which only a rate can do."""
    onsets = [_start(a) for a in calls.onsets((says,))]
    if len(onsets) < 4:
        return False
    starts = [_start(a) for a in calls.admitted]
    counts = [float(bisect_right(starts, at)) for at in onsets]
    slope, intercept = statistics.linear_regression(onsets, counts)
    left = [count - intercept - slope * at for at, count in zip(onsets, counts, strict=True)]
    return statistics.pstdev(left) < 1.0


def fit_rates(calls: _Calls, concurrency: ConcurrencyLimit | None, notes: list[str]) -> list[RateLimit]:
    """Limits on requests and tokens a minute that refused, or that headers told of."""
    told = told_rates(calls.all, notes)
    taken = concurrency is not None and concurrency.says == "unknown"
    kinds: tuple[tuple[RateKind, tuple[str, ...]], ...] = (
        ("requests", ("requests",) if taken else ("requests", "unknown")),
        ("tokens", ("tokens",)),
    )
    found = []
    for kind, says in kinds:
        met = _met_rate(calls, kind, says, notes)
        rate = _reconciled(met, told.get(kind), notes)
        if rate is not None:
            found.append(rate)
    return found


def _met_rate(calls: _Calls, kind: RateKind, says: Sequence[str], notes: list[str]) -> RateLimit | None:
    onsets = [_start(a) for a in calls.onsets(says)]
    if not onsets:
        return None
    amounts = [(_start(a), 1 if kind == "requests" else _tokens(a)) for a in calls.admitted]
    first, last = onsets[0], onsets[-1]
    between = [amount for at, amount in amounts if first < at <= last]
    if len(between) < FEWEST_ADMITTED or last <= first or sum(between) <= 0:
        notes.append(
            f"a limit on {kind} refused, but {len(between)} calls between its refusals are too few to tell the rate; "
            "record for longer"
        )
        return None
    rate = sum(between) / (last - first)
    before = [amount for at, amount in amounts if at <= first]
    burst = sum(before) - rate * (first - amounts[0][0])
    return RateLimit(
        kind,
        60.0 * rate,
        max(1.0, burst),
        "met",
        f"{sum(between)} {kind} let in between the first and the last refusal, {number(last - first)} s apart",
        next(_says(a) for a in calls.refused if _says(a) in says),
    )


def _reconciled(met: RateLimit | None, told: RateLimit | None, notes: list[str]) -> RateLimit | None:
    """What headers tell is exact, so it is preferred to what refusals show, unless they disagree."""
    if met is None or told is None:
        return met or told
    if abs(met.per_minute - told.per_minute) <= AGREES * told.per_minute:
        evidence = f"{met.evidence}; headers tell the same"
        return RateLimit(met.kind, told.per_minute, told.depth, "met", evidence, met.says)
    notes.append(
        f"headers tell of {number(told.per_minute, 4)} {told.kind} per minute, refusals show "
        f"{number(met.per_minute, 4)}; the refusals are believed"
    )
    return met


def told_rates(attempts: Iterable[AttemptRecord], notes: list[str]) -> dict[RateKind, RateLimit]:
    """What headers told of, by kind."""
    states: dict[str, list[RateLimitState]] = {}
    for attempt in attempts:
        for state in attempt.limits:
            states.setdefault(state.dimension, []).append(state)
    found: dict[RateKind, RateLimit] = {}
    kinds: tuple[RateKind, ...] = ("requests", "tokens")
    for kind in kinds:
        rate = _told_rate(kind, states.get(kind, []), notes)
        if rate is not None:
            found[kind] = rate
    left_out = sorted(set(states) - set(kinds))
    if left_out:
        notes.append(f"headers also tell of {' and '.join(left_out)}, which are not modelled")
    return found


def _told_rate(kind: RateKind, states: Sequence[RateLimitState], notes: list[str]) -> RateLimit | None:
    limits = [state.limit for state in states if state.limit and state.limit > 0]
    if not limits:
        return None
    limit = limits[-1]
    pairs = [
        (state.remaining, state.reset_seconds)
        for state in states
        if state.limit == limit and state.remaining and state.reset_seconds is not None
    ]
    slope, intercept = _line(pairs)
    rate, depth = limit / 60.0, limit
    window = "taken as one of a minute"
    if slope < 0:
        rate, depth = -1.0 / slope, -intercept / slope
        window = f"a bucket, by {len(pairs)} answers"
    elif slope > 0:
        seconds = max(reset for _, reset in pairs)
        rate, window = limit / max(1.0, seconds), f"a window of {number(seconds)} s"
    if depth / rate > LONGEST_WINDOW_SECONDS:
        notes.append(f"headers tell of {number(limit, 4)} {kind} in {number(depth / rate)} s, too long to matter here")
        return None
    if abs(rate - limit / 60.0) <= AGREES * rate:
        rate = limit / 60.0
    return RateLimit(kind, 60.0 * rate, max(1.0, depth), "told", f"a limit of {number(limit, 4)}, {window}", kind)


def _line(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Slope and intercept of the reset over what remains; (0, 0) where there is no line."""
    if len(pairs) < FEWEST_ADMITTED or len({remaining for remaining, _ in pairs}) < 3:
        return 0.0, 0.0
    remaining, resets = zip(*pairs, strict=True)
    if len(set(resets)) < 3:
        return 0.0, 0.0
    slope, intercept = statistics.linear_regression(remaining, resets)
    return slope, intercept


def fit_server_slots(calls: _Calls, notes: list[str]) -> ServerSlots | None:
    """How many calls a queueing server works on, if it clearly queues."""
    spans = calls.spans()
    most = max(calls.in_flight_at(calls.admitted), default=0) + 1
    if len(spans) < 4 * most or most < 2:
        return None
    spreads = {slots: _spread(_own_seconds(spans, slots), most) for slots in range(1, most + 1)}
    slots = min(spreads, key=lambda each: spreads[each])
    floor = LEAST_SPREAD_SHARE * statistics.median(calls.seconds())
    clear = slots < most and max(floor, spreads[slots]) <= CLEARLY_LESS * spreads[most]
    if clear and _are_times(_own_seconds(spans, slots)):
        evidence = (
            f"own times vary by {number(spreads[slots])} s, times with the wait there by {number(spreads[most])} s"
        )
        return ServerSlots(slots, evidence)
    if _ramp_is_faster(calls, max(1, most // 2)):
        notes.append(
            "calls that found the provider idle were clearly faster than the others: its latency depends on load, in a "
            "way that is not modelled, so take the figures of lower levels for too pessimistic"
        )
    return None


def _own_seconds(spans: Sequence[tuple[float, float]], slots: int) -> list[float]:
    """Of calls in order of arrival at a server that works on `slots` at once: from their turn to their departure."""
    frees: list[float] = []
    own = []
    for arrival, departure in spans:
        turn = arrival if len(frees) < slots else max(arrival, heapq.heappop(frees))
        heapq.heappush(frees, departure)
        own.append(departure - turn)
    return own


def _spread(seconds: Sequence[float], ramp: int) -> float:
    """Standard deviation, without the calls of the ramps up (connections are cold) and down."""
    return statistics.pstdev(seconds[ramp : len(seconds) - ramp])


def _are_times(seconds: Sequence[float]) -> bool:
    """Whether these can be times that calls take: hardly any is near nothing."""
    low, middle = percentile(seconds, 0.05), percentile(seconds, 0.5)
    return low is not None and middle is not None and low >= LEAST_SHARE_OF_MEDIAN * middle > 0


def _ramp_is_faster(calls: _Calls, slots: int) -> bool:
    """Whether calls that found at most `slots` in flight, themselves counted, took clearly less time than the rest."""
    early: list[float] = []
    late: list[float] = []
    for seconds, others in zip(calls.seconds(), calls.in_flight_at(calls.admitted), strict=True):
        (early if others < slots else late).append(seconds)
    if not early or len(late) < 2:
        return False
    spread = statistics.pstdev(late)
    error = spread * math.sqrt(1 / len(early) + 1 / len(late))
    slower = statistics.fmean(late) - statistics.fmean(early)
    return bool(slower > max(CLEARLY_FASTER * error, (1.0 - CLEARLY_LESS) * statistics.fmean(late)))


@dataclass(frozen=True, slots=True)
class _Due:
    """A start in a spread after a hold: when it was due, when the next one was, and when the next refusal was told."""

    due_at: float
    started_at: float
    refused_at: float
    gap: float

    @property
    def made(self) -> bool:
        """Whether it was this one, and not one after the next hold."""
        return self.started_at < self.refused_at


def _dues(calls: _Calls, level: int) -> list[_Due]:
    """The starts that were due one gap after another, with a slot free and a call waiting."""
    starts, ends = [_start(a) for a in calls.all], sorted(a.ended_at for a in calls.all)
    oldest_waiting = list(itertools.accumulate((a.submitted_at for a in reversed(calls.all)), min))[::-1]
    holds = _holds(calls)
    told = [*(refused_at for refused_at, _ in holds), math.inf]
    found = []
    for (before, start), waiting_since in zip(itertools.pairwise(starts), oldest_waiting[1:], strict=True):
        newest = bisect_right(told, before)
        if newest == 0:
            continue
        refused_at, hold = holds[newest - 1]
        spread = min(LONGEST_SPREAD_SECONDS, hold)
        free = bisect_right(starts, before) - bisect_right(ends, before) < level
        if free and waiting_since <= before < refused_at + hold + spread:
            found.append(_Due(before + spread / level, start, told[newest], spread / level))
    return found


def fit_late_seconds(dues: Sequence[_Due]) -> float:
    """How late the client's timers were on average; 0 where too few starts were spread after a hold to tell."""
    late = [
        due.started_at - due.due_at
        for due in dues
        if due.made and -EARLY_SHARE * due.gap <= due.started_at - due.due_at <= LATEST_SECONDS
    ]
    return max(0.0, statistics.fmean(late)) if len(late) >= FEWEST_DUE else 0.0


def fit_busy_seconds(dues: Sequence[_Due], late_seconds: float) -> float:
    """How long before a refusal is told the client starts nothing more; 0 where too few starts were due then to tell,
    or where a quarter of those were made.

    Where several times tell them apart equally well, the shortest.
    """
    ahead = [(due.refused_at - due.due_at - late_seconds, due.made) for due in dues]
    near = sorted(each for each in ahead if 0.0 < each[0] <= LATEST_SECONDS)
    if len(near) < FEWEST_DUE:
        return 0.0
    best, most, withheld, made = 0.0, 0, 0, 0
    for seconds, was_made in near:
        made += was_made
        withheld += not was_made
        if withheld - made > most and made < MOST_MADE * (made + withheld):
            best, most = seconds, withheld - made
    return best


def _holds(calls: _Calls) -> list[tuple[float, float]]:
    """When each refusal held others back, and for how many seconds: until the refused call itself is back."""
    back = {(a.operation_id, a.attempt): a.submitted_at for a in calls.all if a.attempt > 1}
    found = []
    for refusal in calls.refused:
        back_at = back.get((refusal.operation_id, refusal.attempt + 1))
        hold = refusal.retry_after_seconds if back_at is None else back_at - refusal.ended_at + COME_BACK_SECONDS
        if hold:
            found.append((refusal.ended_at, hold))
    return sorted(found)


def _rate_seen(calls: _Calls) -> float:
    """Admitted calls a second, from the first start to the last."""
    starts = [_start(a) for a in calls.admitted]
    return (len(starts) - 1) / (starts[-1] - starts[0]) if len(starts) > 1 and starts[-1] > starts[0] else 0.0


def _retry_after(refused: Sequence[AttemptRecord]) -> RetryAfter:
    told = [a.retry_after_seconds for a in refused if a.retry_after_seconds is not None]
    if not told:
        return "none" if refused else "exact"
    if len(told) > 1 and len(set(told)) == 1:
        return told[0]
    return "whole" if all(seconds == int(seconds) for seconds in told) else "exact"


def _samples(admitted: Sequence[AttemptRecord], seconds: Sequence[float]) -> dict[str | None, tuple[Sample, ...]]:
    """By stage. Without those that began before any had ended, where connections are cold, if that leaves enough."""
    first_end = min((a.ended_at for a in admitted), default=0.0)
    found: dict[str | None, list[Sample]] = {}
    cold: dict[str | None, int] = {}
    for attempt, own in zip(admitted, seconds, strict=True):
        found.setdefault(attempt.stage, []).append(_sample(attempt, max(0.0, own)))
        cold[attempt.stage] = cold.get(attempt.stage, 0) + (_start(attempt) < first_end)
    return {
        stage: tuple(samples[cold[stage] :] if len(samples) >= ENOUGH_WARM * cold[stage] else samples)
        for stage, samples in found.items()
    }


def _sample(attempt: AttemptRecord, seconds: float) -> Sample:
    failed = attempt.outcome != "ok"
    return Sample(seconds, _tokens(attempt), failed, attempt.status_code if failed else None)


def _tokens(attempt: AttemptRecord) -> int:
    return (attempt.input_tokens or 0) + (attempt.output_tokens or 0)


def _is_refusal(attempt: AttemptRecord) -> bool:
    return attempt.outcome == "rejected" and _says(attempt) in (*RATES, "concurrency")


def _says(attempt: AttemptRecord) -> str:
    return attempt.limit_type or "unknown"


def _start(attempt: AttemptRecord) -> float:
    assert attempt.started_at is not None
    return attempt.started_at
