"""What sustained refusals of one model lead to: no more retries, and longer and longer pauses.

Rules
- Retries are paid from a budget: `RESERVE` to begin with; each success brings `PER_SUCCESS`, up to the reserve.
  So refusals that come and go are retried, and a provider that refuses nearly all is asked at most 1 + PER_SUCCESS
  times for each success. (A retry budget, as in Finagle, with a ratio that rate limits can live with.)
- When it is spent, the model's waiters are held back as well, for `FIRST_PAUSE_SECONDS`, doubling with each further
  refusal up to `LONGEST_PAUSE_SECONDS`. After a pause those who start find out; a success ends all of it.
- Out of quota: nobody of that model is let in for `QUOTA_SECONDS`; then one may find out.
"""

from __future__ import annotations

import math

RESERVE = 100.0
PER_SUCCESS = 10.0
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
QUOTA_SECONDS = 60.0


class Breaker:
    """Of one model. Not thread-safe."""

    __slots__ = ("_budget", "_first_at", "_pause", "_paused_until", "_refused", "out_of_quota_until")

    def __init__(self) -> None:
        self._budget = RESERVE
        self._pause = FIRST_PAUSE_SECONDS
        self._refused = 0
        self._first_at = 0.0
        self._paused_until = -math.inf
        self.out_of_quota_until = -math.inf

    def succeeded(self) -> None:
        """A call was let in, and has ended well."""
        self._budget = min(RESERVE, self._budget + PER_SUCCESS)
        self._pause = FIRST_PAUSE_SECONDS
        self._paused_until = -math.inf
        self._refused = 0
        self.out_of_quota_until = -math.inf

    def refused(self, now: float) -> None:
        """A call was refused."""
        if not self._refused:
            self._first_at = now
        self._refused += 1

    def quota(self, now: float) -> None:
        """There is no money left."""
        self.out_of_quota_until = now + QUOTA_SECONDS

    def may_retry(self) -> bool:
        """Pay for one retry; False: the budget is spent."""
        if self._budget < 1.0:
            return False
        self._budget -= 1.0
        return True

    def pause_seconds(self, now: float) -> float:
        """How long to hold the model's waiters back once the budget is spent; after each pause twice as long."""
        if self._budget >= 1.0 or now < self._paused_until:  # those that were in flight together are one sign
            return 0.0
        seconds = self._pause
        self._pause = min(LONGEST_PAUSE_SECONDS, 2.0 * seconds)
        self._paused_until = now + seconds
        return seconds

    def figures(self, now: float) -> str:
        """How many refusals there were since the last success, in words."""
        return f"{self._refused} refusals in a row, over {now - self._first_at:.1f} s"
