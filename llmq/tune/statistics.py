"""The few statistics that a sweep needs."""

import math
from collections.abc import Sequence

SAMPLES_FOR_P95 = 72
"""The least sample in which a distribution-free interval for the 95th percentile exists at 95 % confidence."""


def percentile(values: Sequence[float], share: float) -> float | None:
    """The `share` quantile (0 to 1) by linear interpolation (Hyndman and Fan, 1996, type 7); None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def wilson(hits: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval (1927) for a share; (0, 1) of nothing."""
    if total == 0:
        return 0.0, 1.0
    share = hits / total
    denominator = 1 + z * z / total
    middle = (share + z * z / (2 * total)) / denominator
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / denominator
    return max(0.0, middle - half), min(1.0, middle + half)


def overlap_seconds(spans: Sequence[tuple[float, float]], start: float, end: float) -> float:
    """How much time the spans have in [start, end], summed. Divided by its length: the mean number at once."""
    return sum(max(0.0, min(end, last) - max(start, first)) for first, last in spans)
