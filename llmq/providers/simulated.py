"""The simulated provider: the model and the limits behind one door, and its own account of what came in.

`begin` and `end` are plain functions with the time as an argument; the HTTP server calls them around its sleep, and
`complete` does the same in-process, in real or virtual time.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

import anyio

from llmq.errors import ProviderError
from llmq.providers.chat import ChatAnswer, ChatRequest
from llmq.providers.limits import Limits, Refused
from llmq.providers.model import Plan, plan
from llmq.providers.spec import ProviderSpec
from llmq.waiters import clock

MAX_CALLS = 200_000
"""Requests of which `stats(calls=True)` can tell each one."""


@dataclass(slots=True)
class Exchange:
    """One request at the provider. `status` 0 while it runs, or where the client went away."""

    request: ChatRequest
    digest: str
    attempt: int
    started_at: float
    seconds: float
    plan: Plan | None
    refused: Refused | None
    headers: dict[str, str]
    ended_at: float | None = None
    status: int = 0

    @property
    def body_of_refusal(self) -> dict[str, Any]:
        """The error object that OpenAI would send."""
        assert self.refused is not None
        limit_type = self.refused.limit_type
        return {
            "message": f"Rate limit reached for {self.request.model} on {limit_type}.",
            "type": limit_type,
            "param": None,
            "code": "rate_limit_exceeded",
        }


class SimulatedProvider:
    """A provider in this process. Also a `ChatClient`: `await provider.complete(request)`."""

    def __init__(self, spec: ProviderSpec | None = None) -> None:
        self.spec = spec or ProviderSpec()
        self._guard = threading.Lock()
        self._limits: Limits | None = None
        self._admitted: Counter[str] = Counter()
        self._in_flight = 0
        self._peak_in_flight = 0
        self._statuses: Counter[int] = Counter()
        self._refusals: Counter[str] = Counter()
        self._exchanges: deque[Exchange] = deque(maxlen=MAX_CALLS)

    def begin(self, request: ChatRequest, now: float) -> Exchange:
        """Take a request in: `seconds` says how long to sleep before `end`.

        The attempt number counts how often this body was let in before: a refusal is no attempt, so that
        faults do not depend on load.
        """
        digest = request.digest()
        with self._guard:
            if self._limits is None:
                self._limits = Limits(self.spec, now)
            attempt = self._admitted[digest] + 1
            planned = plan(self.spec, request, attempt)
            tokens = planned.answer.prompt_tokens + planned.answer.completion_tokens
            refused = self._limits.refuses(tokens, self._in_flight, now)
            if refused is None:
                self._admitted[digest] = attempt
                self._in_flight += 1
                self._peak_in_flight = max(self._peak_in_flight, self._in_flight)
                seconds = self._seconds(planned)
            else:
                seconds = self.spec.refusal_seconds
            headers = self._limits.headers(now)
            if refused is not None:
                headers["retry-after"] = str(math.ceil(refused.retry_after_seconds))
                headers["retry-after-ms"] = str(math.ceil(refused.retry_after_seconds * 1000))
            exchange = Exchange(request, digest, attempt, now, seconds, None if refused else planned, refused, headers)
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
            await anyio.sleep(exchange.seconds)
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

    def _seconds(self, planned: Plan) -> float:
        if planned.fault == "timeout":
            return self.spec.hang_seconds
        load = 1.0 if self.spec.load_slots is None else max(1.0, self._in_flight / self.spec.load_slots)
        return planned.service_seconds * load


def _verdict(exchange: Exchange) -> tuple[int, ChatAnswer | ProviderError]:
    if exchange.refused is not None:
        body = exchange.body_of_refusal
        return 429, ProviderError(body["message"], status_code=429, headers=exchange.headers, body=body)
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
