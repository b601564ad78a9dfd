"""The simulated provider's limits: token buckets for requests and tokens, and a cap on what runs at once.

Pure, time is an argument. A bucket holds up to `bucket_seconds` of its rate and refills continuously. A request
that does not fit is refused and takes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmq.providers.spec import ProviderSpec

LimitType = Literal["requests", "tokens", "concurrency"]


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a request was turned away, and in how many seconds it would have fitted."""

    limit_type: LimitType
    retry_after_seconds: float


class Bucket:
    """`level` units, refilled at `rate` a second up to `depth`; starts full."""

    def __init__(self, per_minute: float, depth_seconds: float, now: float) -> None:
        self.rate = per_minute / 60.0
        self.depth = max(1.0, self.rate * depth_seconds)
        self.per_minute = per_minute
        self._level = self.depth
        self._as_of = now

    def level(self, now: float) -> float:
        """What is in the bucket at `now`."""
        return min(self.depth, self._level + (now - self._as_of) * self.rate)

    def seconds_until(self, amount: float, now: float) -> float:
        """Until `amount` fits; more than the whole depth fits when the bucket is full."""
        missing = min(amount, self.depth) - self.level(now)
        return 0.0 if missing <= 1e-9 else missing / self.rate

    def take(self, amount: float, now: float) -> None:
        """Take `amount`, into debt if it must be."""
        self._level = self.level(now) - amount
        self._as_of = now


class Limits:
    """All limits of one provider."""

    def __init__(self, spec: ProviderSpec, now: float) -> None:
        self._max_concurrency = spec.max_concurrency
        self._buckets: dict[LimitType, Bucket] = {}
        if spec.requests_per_minute is not None:
            self._buckets["requests"] = Bucket(spec.requests_per_minute, spec.bucket_seconds, now)
        if spec.tokens_per_minute is not None:
            self._buckets["tokens"] = Bucket(spec.tokens_per_minute, spec.bucket_seconds, now)

    def refuses(self, tokens: int, in_flight: int, now: float) -> Refused | None:
        """Take what a request needs, or say why it is refused."""
        if self._max_concurrency is not None and in_flight >= self._max_concurrency:
            return Refused("concurrency", 1.0)
        needs = {"requests": 1, "tokens": tokens}
        waits = {kind: bucket.seconds_until(needs[kind], now) for kind, bucket in self._buckets.items()}
        longest = max(waits, key=lambda kind: waits[kind], default=None)
        if longest is not None and waits[longest] > 0:
            return Refused(longest, waits[longest])
        for kind, bucket in self._buckets.items():
            bucket.take(needs[kind], now)
        return None

    def headers(self, now: float) -> dict[str, str]:
        """`x-ratelimit-*` as OpenAI writes them: limit and remaining as counts, reset as seconds until full."""
        found: dict[str, str] = {}
        for kind, bucket in self._buckets.items():
            level = bucket.level(now)
            found[f"x-ratelimit-limit-{kind}"] = f"{bucket.per_minute:.0f}"
            found[f"x-ratelimit-remaining-{kind}"] = f"{max(0.0, level):.0f}"
            found[f"x-ratelimit-reset-{kind}"] = f"{(bucket.depth - level) / bucket.rate:.3f}s"
        return found
