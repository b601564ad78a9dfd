"""What a queue remembers of each model's refusals: shall one more try be made, and until when do the others wait.

Thread-safe. The rules themselves are those of `llmq.core.breaker`.
"""

from __future__ import annotations

import threading

from llmq import waiters
from llmq.core.breaker import Breaker
from llmq.retry import Kind, Verdict

MAX_MODELS = 1000
_UNKNOWN_SECONDS = 1.0
_WEIGHT = 0.1


class Refusals:
    """Of one queue."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._breakers: dict[str | None, Breaker] = {}
        self._typical: dict[str | None, float] = {}
        self.any_quota = False

    def succeeded(self, model: str | None, service_seconds: float) -> None:
        """A call has ended well."""
        known = self._typical.get(model)
        if known is not None:
            self._typical[model] = known + _WEIGHT * (service_seconds - known)  # one that is lost does not matter
        elif len(self._typical) < MAX_MODELS:
            self._typical[model] = service_seconds
        if self._breakers:
            with self._lock:
                breaker = self._breakers.get(model)
                if breaker is not None:
                    breaker.succeeded()

    def typical_seconds(self, model: str | None) -> float:
        """A moving average of how long calls ran in their slots."""
        return self._typical.get(model, _UNKNOWN_SECONDS)

    def decide(
        self, model: str | None, verdict: Verdict, delay_seconds: float | None, error: BaseException
    ) -> float | None:
        """The delay before another attempt, or None for none; a refusal's figures then go with its error."""
        if not verdict.refused and delay_seconds is None:
            return None
        now = waiters.now()
        with self._lock:
            breaker = self._breaker(model)
            if verdict.refused:
                breaker.refused(now)
            if verdict.kind is Kind.QUOTA:
                breaker.quota(now)
                self.any_quota = True
            spent = delay_seconds is not None and not breaker.may_retry()
            figures = breaker.figures(now)
        if delay_seconds is not None and not spent:
            return delay_seconds
        if verdict.refused:
            why = "; its retry budget is spent, so it was not tried again" if spent else ""
            error.add_note(f"llmq: model {model}: {figures}, limit on {verdict.limit_type}{why}")
        return None

    def pause_seconds(self, model: str | None) -> float:
        """How long to hold a model's waiters back for its refusals, beyond what it says itself."""
        with self._lock:
            breaker = self._breakers.get(model)
            return 0.0 if breaker is None else breaker.pause_seconds(waiters.now())

    def quota_spent(self, model: str | None) -> str | None:
        """Why nobody of this model is to be let in, in words, or None."""
        if not self.any_quota:
            return None
        now = waiters.now()
        with self._lock:
            self.any_quota = any(breaker.out_of_quota_until > now for breaker in self._breakers.values())
            breaker = self._breakers.get(model)
            if breaker is None or breaker.out_of_quota_until <= now:
                return None
            left = breaker.out_of_quota_until - now
            return (
                f"the provider says that the quota of model {model} is used up ({breaker.figures(now)}); see to its "
                f"billing. The next call is let through in {left:.0f} s"
            )

    def forget(self) -> None:
        """Take everybody for well again."""
        with self._lock:
            self._breakers.clear()
            self.any_quota = False

    def _breaker(self, model: str | None) -> Breaker:
        found = self._breakers.get(model)
        if found is None:
            if len(self._breakers) >= MAX_MODELS:
                self._breakers.pop(next(iter(self._breakers)))
            found = self._breakers[model] = Breaker()
        return found
