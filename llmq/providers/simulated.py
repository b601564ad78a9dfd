"""The simulated provider: the model and the limits behind one door, and its own account of what came in.

`begin` and `end` are plain functions with the time as an argument; the HTTP server calls them around its sleep, and
`complete` does the same in-process, in real or virtual time.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass
from heapq import heappush, heapreplace
from typing import Any

import anyio

from llmq.errors import ProviderError
from llmq.providers.chat import ChatAnswer, ChatRequest
from llmq.providers.dialects import limit_headers, refusal_body, retry_headers
from llmq.providers.limits import Limits, LimitState, Refused
from llmq.providers.model import Plan, cold_factor, plan, refused_at_random
from llmq.providers.spec import ProviderSpec
from llmq.waiters import clock, in_trio_run, running_loop

MAX_CALLS = 200_000
"""Requests of which `stats(calls=True)` can tell each one."""


_MOST_DIGESTS = 4096
_RANDOM = Refused("random", None)


@dataclass(slots=True)
class Exchange:
    """One request at the provider. `status` 0 while it runs, or where the client went away."""

    spec: ProviderSpec
    request: ChatRequest
    digest: str
    attempt: int
    started_at: float
    seconds: float
    plan: Plan | None
    refused: Refused | None
    limits: tuple[LimitState, ...]
    ended_at: float | None = None
    status: int = 0

    def headers(self, wall_seconds: float) -> dict[str, str]:
        """The answer's headers that tell of limits; `wall_seconds` since the epoch is when it began."""
        told = limit_headers(self.spec, self.limits, wall_seconds)
        return told if self.refused is None else told | retry_headers(self.spec, self.refused)

    @property
    def body_of_refusal(self) -> dict[str, Any]:
        """The error object that a provider of the dialect would send."""
        assert self.refused is not None
        return refusal_body(self.spec, self.refused, self.request.model)


class SimulatedProvider:
    """A provider in this process. Also a `ChatClient`: `await provider.complete(request)`."""

    def __init__(self, spec: ProviderSpec | None = None) -> None:
        self.spec = spec or ProviderSpec()
        self._guard = threading.Lock()
        self._first_at = 0.0
        self._limits: Limits | None = None
        self._slots_free_at: list[float] = []
        """A heap: when each of the slots taken so far gets free."""
        self._admitted: Counter[str] = Counter()
        self._refused_at_random: Counter[str] = Counter()
        self._in_flight = 0
        self._peak_in_flight = 0
        self._statuses: Counter[int] = Counter()
        self._refusals: Counter[str] = Counter()
        self._exchanges: deque[Exchange] = deque(maxlen=MAX_CALLS)
        self._digests: dict[tuple[object, ...], str] = {}

    def begin(self, request: ChatRequest, now: float) -> Exchange:
        """Take a request in: `seconds` says how long to sleep before `end`.

        The attempt number counts how often this body was let in before: a refusal is no attempt, so that
        faults do not depend on load.
        """
        with self._guard:
            digest = self._digest(request)
            if self._limits is None:
                self._limits = Limits(self.spec, now)
                self._first_at = now
            attempt = self._admitted[digest] + 1
            planned = plan(self.spec, request, attempt, digest)
            refused = self._refuses(digest, attempt, planned.answer, now)
            if refused is None:
                self._admitted[digest] = attempt
                self._in_flight += 1
                self._peak_in_flight = max(self._peak_in_flight, self._in_flight)
                seconds = self._seconds(planned, now)
            else:
                seconds = self.spec.refusal_seconds
            told = () if refused is _RANDOM else self._limits.states(now)
            plan_kept = None if refused else planned
            exchange = Exchange(self.spec, request, digest, attempt, now, seconds, plan_kept, refused, told)
            self._exchanges.append(exchange)
            return exchange

    def end(self, exchange: Exchange, status: int, now: float) -> None:
        """A request is over. `status` 0: its client went away first."""
        with self._guard:
            exchange.ended_at = now
            exchange.status = status
            self._statuses[status] += 1
            if exchange.refused is None:
                self._in_flight -= 1
            else:
                self._refusals[exchange.refused.limit_type] += 1

    async def complete(self, request: ChatRequest) -> ChatAnswer:
        """Ask once, in-process. Raises `ProviderError` as an HTTP client would."""
        exchange = self.begin(request, clock())
        status = 0
        try:
            await _sleep(exchange.seconds)
            status, answer = _verdict(exchange)
        finally:
            self.end(exchange, status, clock())
        if isinstance(answer, ProviderError):
            raise answer
        return answer

    def stats(self, *, calls: bool = False) -> dict[str, Any]:
        """The provider's own truth: requests, refusals, peak in flight, and times by stage.

        With `calls` also each request: stage, service_id, digest of the body, attempt, status, started_at, ended_at.
        """
        with self._guard:
            stages: dict[str, dict[str, float]] = {}
            for exchange in self._exchanges:
                stage = stages.setdefault(
                    exchange.request.stage or "", {"requests": 0, "first_started_at": exchange.started_at}
                )
                stage["requests"] += 1
                if exchange.ended_at is not None:
                    stage["last_ended_at"] = max(stage.get("last_ended_at", 0.0), exchange.ended_at)
            found: dict[str, Any] = {
                "requests": sum(self._statuses.values()) + self._in_flight,
                "admitted": sum(self._admitted.values()),
                "refused": sum(self._refusals.values()),
                "refused_by_type": dict(self._refusals),
                "by_status": {str(status): count for status, count in sorted(self._statuses.items())},
                "in_flight": self._in_flight,
                "peak_in_flight": self._peak_in_flight,
                "stages": stages,
            }
            if calls:
                found["calls"] = [
                    {
                        "stage": exchange.request.stage,
                        "service_id": exchange.request.service_id,
                        "digest": exchange.digest,
                        "attempt": exchange.attempt,
                        "status": exchange.status,
                        "started_at": exchange.started_at,
                        "ended_at": exchange.ended_at,
                    }
                    for exchange in self._exchanges
                ]
            return found

    def _refuses(self, digest: str, attempt: int, answer: ChatAnswer, now: float) -> Refused | None:
        """A random refusal takes nothing of any limit, and what a limit refuses is drawn again."""
        assert self._limits is not None
        if self.spec.refusal_ratio > 0:
            before = self._refused_at_random[digest]
            if refused_at_random(self.spec, digest, attempt + before):
                self._refused_at_random[digest] = before + 1
                return _RANDOM
        return self._limits.refuses(answer.prompt_tokens + answer.completion_tokens, self._in_flight, now)

    def _seconds(self, planned: Plan, now: float) -> float:
        """In line for a slot, and in service. The slot stays taken if the client goes away; a hang holds it, too."""
        spec = self.spec
        if spec.server_slots is None:
            return self._service_seconds(planned, now)
        waits_for_one = len(self._slots_free_at) == spec.server_slots
        start = max(now, self._slots_free_at[0]) if waits_for_one else now
        service = self._service_seconds(planned, start)
        if waits_for_one:
            heapreplace(self._slots_free_at, start + service)
        else:
            heappush(self._slots_free_at, start + service)
        return start - now + service

    def _service_seconds(self, planned: Plan, start: float) -> float:
        if planned.fault == "timeout":
            return self.spec.hang_seconds
        load = 1.0 if self.spec.load_slots is None else max(1.0, self._in_flight / self.spec.load_slots)
        return planned.service_seconds * load * cold_factor(self.spec, start - self._first_at)

    def _digest(self, request: ChatRequest) -> str:
        """The request's digest; that of plain text is kept, since sweeps ask the same again."""
        if request.schema is not None:
            return request.digest()
        body: list[object] = [request.model]
        for message in request.messages:
            for name, text in message.items():
                if type(text) is not str:
                    return request.digest()
                body += name, text
            body.append(None)
        key = tuple(body)
        found = self._digests.get(key)
        if found is None:
            if len(self._digests) >= _MOST_DIGESTS:
                self._digests.clear()
            found = self._digests[key] = request.digest()
        return found


async def _sleep(seconds: float) -> None:
    """`anyio.sleep`, with less ado on asyncio."""
    if running_loop() is None or in_trio_run():
        await anyio.sleep(seconds)
    else:
        await asyncio.sleep(seconds)


def _verdict(exchange: Exchange) -> tuple[int, ChatAnswer | ProviderError]:
    if exchange.refused is not None:
        body = exchange.body_of_refusal
        headers = exchange.headers(time.time())
        return 429, ProviderError(body["message"], status_code=429, headers=headers, body=body)
    assert exchange.plan is not None
    match exchange.plan.fault:
        case "error":
            return 500, ProviderError("the simulated provider failed (error_ratio)", status_code=500)
        case "timeout":
            return 504, ProviderError("the simulated provider hung (timeout_ratio)", status_code=504)
        case "cut":
            return 200, ProviderError("the connection was cut half-way (cut_ratio)", connection_lost=True)
        case _:
            return 200, exchange.plan.answer
