"""What refusals tell about the limit behind them. Pure functions of the attempts of one window.

- *A rate* lets in what its bucket refills with, whatever is in flight. When a refusal follows an admission (an onset),
  the bucket is just empty, or the window just full; so what was let in between two onsets, by the time between them,
  is the rate itself. (The policer estimator of BBR, Cardwell et al. 2016; onsets, and not any refusal, since a fixed
  window goes on refusing until it ends.)
- *A window* lets in what fits and is then closed for long. What was let in between two reopenings is a whole number of
  windows, so that, by the time between them, is the rate.
- *A limit on what is in flight* refuses when and only when so much is in flight. So what was in flight at refusals is
  more than at admissions; for a rate the two look alike.
- *A share of refusals that is the same at every level* is not caused by concurrency, see `recommend`.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmq.records import AttemptRecord

RATES = ("requests", "tokens", "unknown")
"""Limits on a rate, and those that do not say what they limit."""

CLEARLY_SEPARATE = 0.9
SEGMENTS = 8
CALLS_IN_A_PART = 24
SECONDS_IN_A_PART = 5.0
_PAUSE_SHARE = 1.5
_PAUSE_SECONDS = 0.5
CALLS_IN_A_WINDOW = 20
_CLOSED_SECONDS = 1.0
_CLOSED_TIMES = 5.0
_CLOSED_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class RateSeen:
    """`admitted` calls with `tokens` in `seconds`, from the first onset of refusals to the last of `onsets`.

    `slowest`: calls a second in the slowest of parts of at least 5 s, `fastest` in the fastest; None without such
    parts. `told`: the rate is what headers say, which what was let in confirms.
    """

    admitted: int
    tokens: int
    seconds: float
    onsets: int
    slowest: float | None
    fastest: float | None
    told: bool = False

    @property
    def per_second(self) -> float:
        """Calls a second."""
        return self.admitted / self.seconds


@dataclass(frozen=True, slots=True)
class Separation:
    """Whether refusals depend on what is in flight. `share`: how often a refusal met more in flight than an admission
    (Mann and Whitney's U over the product of both counts; 1: always, 0.5: no difference).

    `let_in`: the most in flight that an admission made; `refused_at`: what was in flight at the median refusal.
    """

    share: float
    let_in: int
    refused_at: int

    @property
    def clear(self) -> bool:
        """Whether it is a limit on calls at once, whatever the refusal calls itself."""
        return self.share >= CLEARLY_SEPARATE


def rate_seen(attempts: Sequence[AttemptRecord]) -> RateSeen | None:
    """What refusals tell of a rate; None with fewer than two onsets. By the starts: answers are read late.

    Where nothing was sent for longer than the provider had asked for, a bucket may have been full, and what it lost is
    not seen; such a pause ends a stretch, and within stretches onsets are compared.
    """
    reopenings = _reopenings(attempts)
    stretches = [reopenings] if reopenings else _stretches(attempts)
    stretches = [marks for marks in stretches if len(marks) > 1 and marks[-1][1] > marks[0][1]]
    if not stretches:
        return None
    admitted = sum(marks[-1][1] - marks[0][1] for marks in stretches)
    seconds = sum(marks[-1][0] - marks[0][0] for marks in stretches)
    rates = [] if reopenings else [rate for marks in stretches for rate in _rates_of_parts(marks, admitted)]
    tokens = round(admitted * _tokens_of_a_call(attempts))
    seen = sum(map(len, stretches))
    return RateSeen(admitted, tokens, seconds, seen, min(rates, default=None), max(rates, default=None))


def closed_seconds(attempts: Sequence[AttemptRecord]) -> float:
    """The longest that nothing was let in for, after a refusal that asked for no shorter wait; 0 without one.

    What was closed at the end was so until the last refusal at least.
    """
    longest, last_admitted, refusal = 0.0, None, None
    for attempt in _in_order(attempts):
        if attempt.outcome == "rejected":
            refusal = attempt
            longest = max(longest, _started(attempt) - (_started(attempt) if last_admitted is None else last_admitted))
            continue
        if refusal is not None and last_admitted is not None:
            closed = _started(attempt) - last_admitted
            asked_for = refusal.retry_after_seconds
            if asked_for is None or closed <= _PAUSE_SHARE * asked_for + _PAUSE_SECONDS:
                longest = max(longest, closed)
        last_admitted, refusal = _started(attempt), None
    return longest


def _reopenings(attempts: Sequence[AttemptRecord]) -> list[tuple[float, int]]:
    """When a limit let calls in again after it had been closed for long, and how many had been let in by then; empty
    where it is not one that closes for a good part of the time."""
    sent = _in_order(attempts)
    starts = [_started(a) for a in sent if a.outcome != "rejected"]
    if len(starts) < CALLS_IN_A_WINDOW:
        return []
    usual = (starts[-1] - starts[0]) / len(starts)
    found: list[tuple[float, int]] = []
    closed, was_refused, admitted = 0.0, False, 0
    for attempt in sent:
        if attempt.outcome == "rejected":
            was_refused = True
            continue
        if was_refused and admitted:
            gap = _started(attempt) - starts[admitted - 1]
            if gap >= max(_CLOSED_SECONDS, _CLOSED_TIMES * usual):
                found.append((_started(attempt), admitted))
                closed += gap
        admitted, was_refused = admitted + 1, False
    return found if closed >= _CLOSED_SHARE * (starts[-1] - starts[0]) else []


def _in_order(attempts: Sequence[AttemptRecord]) -> list[AttemptRecord]:
    """By their starts, without those that a limit of another kind refused.

    Of those that start in one moment the admitted ones come first: they are what empties the bucket.
    """
    counted = (a for a in attempts if a.started_at is not None and (a.outcome != "rejected" or by_a_rate(a)))
    return sorted(counted, key=lambda a: (_started(a), a.outcome == "rejected"))


def _stretches(attempts: Sequence[AttemptRecord]) -> list[list[tuple[float, int]]]:
    """The onsets of each stretch: when, and how many had been let in by then."""
    found: list[list[tuple[float, int]]] = [[]]
    admitted = 0
    was_refused = False
    last_at, asked_for = 0.0, math.inf  # where nothing was asked for, no pause is too long
    for attempt in _in_order(attempts):
        at, refused = _started(attempt), attempt.outcome == "rejected"
        if was_refused and at - last_at > _PAUSE_SHARE * asked_for + _PAUSE_SECONDS:
            found.append([])
        if refused and not was_refused:
            found[-1].append((at, admitted))
        if refused:
            asked_for = math.inf if attempt.retry_after_seconds is None else attempt.retry_after_seconds
        admitted += not refused
        was_refused, last_at = refused, at
    return found


def by_a_rate(refusal: AttemptRecord) -> bool:
    """Whether a refusal is one by a limit on a rate, or by one that does not say what it limits."""
    return (refusal.limit_type or "unknown") in RATES


def _tokens_of_a_call(attempts: Sequence[AttemptRecord]) -> float:
    """On average, of those that told: failed and cancelled ones are charged, too, and tell nothing."""
    told = [(a.input_tokens or 0) + (a.output_tokens or 0) for a in attempts if a.output_tokens is not None]
    return sum(told) / len(told) if told else 0.0


def _rates_of_parts(onsets: Sequence[tuple[float, int]], admitted: int) -> list[float]:
    """Calls a second in consecutive parts between onsets, each long enough to mean something."""
    least = max(CALLS_IN_A_PART, admitted / SEGMENTS)
    found = []
    since, before = onsets[0]
    for at, after in onsets[1:]:
        if after - before >= least and at - since >= SECONDS_IN_A_PART:
            found.append((after - before) / (at - since))
            since, before = at, after
    return found


def separation(attempts: Sequence[AttemptRecord]) -> Separation | None:
    """Whether refusals depend on what is in flight; None without at least three refusals and as many admissions."""
    let_in = sorted((a for a in attempts if a.outcome != "rejected" and a.started_at is not None), key=_started)
    refused = [_started(a) for a in attempts if a.outcome == "rejected" and a.started_at is not None]
    if len(let_in) < 3 or len(refused) < 3:
        return None
    starts = [_started(a) for a in let_in]
    ends = sorted(a.ended_at for a in let_in)

    def in_flight(at: float) -> int:
        return bisect.bisect_left(starts, at) - bisect.bisect_right(ends, at)

    at_admissions = np.array([in_flight(at) for at in starts])
    at_refusals = np.array([in_flight(at) for at in refused])
    ordered = np.sort(at_admissions)
    below = np.searchsorted(ordered, at_refusals, "left")
    ties = np.searchsorted(ordered, at_refusals, "right") - below
    share = float((below + 0.5 * ties).sum() / (len(ordered) * len(at_refusals)))
    return Separation(share, int(at_admissions.max()) + 1, int(np.median(at_refusals)))


def _started(attempt: AttemptRecord) -> float:
    return attempt.started_at or 0.0
