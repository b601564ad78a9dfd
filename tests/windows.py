"""Windows and rates with plain figures, for tests of what follows from them."""

from llmq.tune.limits import RateSeen
from llmq.tune.point import Point
from llmq.tune.statistics import wilson


def point(level, goodput, *, error=0.01, attempts=1000, refused=0, seconds=10.0, **more):
    """A window; `error`: the standard error of its goodput, relative."""
    share = wilson(refused, attempts)
    values = {
        "order": 0,
        "purpose": "level",
        "warm_up_seconds": 1.0,
        "succeeded": attempts - refused,
        "failed": 0,
        "goodput_low": goodput * (1 - 1.96 * error),
        "goodput_high": goodput * (1 + 1.96 * error),
        "attempt_rate": goodput * attempts / max(1, attempts - refused),
        "share_429": refused / attempts,
        "share_429_low": share.low,
        "share_429_high": share.high,
        "error_share": 0.0,
        "error_share_low": 0.0,
        "error_share_high": 0.004,
        "in_flight": float(level),
        "service_mean": 1.0,
        "refused_by": "requests" if refused else None,
    }
    return Point(
        level=level, window_seconds=seconds, attempts=attempts, refused=refused, goodput=goodput, **values | more
    )


def rate(admitted=500, seconds=100.0, *, tokens=0, onsets=20, slowest=None, fastest=None):
    per_second = admitted / seconds
    return RateSeen(admitted, tokens, seconds, onsets, slowest or per_second, fastest or per_second)
