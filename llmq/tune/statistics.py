"""The figures behind a point: shares, percentiles, rates, each with a 95 % interval. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

SAMPLES_FOR_P95 = 72
"""With fewer there is no distribution-free interval of the 95th percentile at 95 % confidence."""

BLOCKS = 40
"""Equal parts of a window that `count_interval` looks at."""

SURE = 1.645
"""One-sided 95 % of a normal distribution."""

_BLOCK_SUMS = (1, 2, 4, 8)
_LEAST_SUMS = 5
_CLEARLY = 5.0  # standard errors; the cut was chosen to differ


class Interval(NamedTuple):
    """Both ends of a 95 % interval."""

    low: float
    high: float


def percentile(values: Sequence[float], share: float) -> float | None:
    """The `share` quantile (0 to 1) by linear interpolation (Hyndman and Fan, 1996, type 7); None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def percentile_interval(values: Sequence[float], share: float) -> Interval | None:
    """A distribution-free 95 % interval of a percentile: two order statistics, by the binomial distribution (David and
    Nagaraja, Order Statistics, 2003, section 7.1). None where there are too few values for one.
    """
    n = len(values)
    low = int(stats.binom.ppf(0.025, n, share)) if n else 0
    high = int(stats.binom.ppf(0.975, n, share)) + 1 if n else 0
    if low < 1 or high > n:
        return None
    ordered = sorted(values)
    return Interval(ordered[low - 1], ordered[high - 1])


def wilson(hits: int, total: int, z: float = 1.96) -> Interval:
    """Wilson's score interval (1927) for a share; (0, 1) of nothing."""
    if total == 0:
        return Interval(0.0, 1.0)
    share = hits / total
    denominator = 1 + z * z / total
    middle = (share + z * z / (2 * total)) / denominator
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / denominator
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


def overlap_seconds(spans: Sequence[tuple[float, float]], start: float, end: float) -> float:
    """How much time the spans have in [start, end], summed. Divided by its length: the mean number at once."""
    return math.fsum(max(0.0, min(end, last) - max(start, first)) for first, last in spans)  # in any order the same


def block_counts(times: Sequence[float], start: float, end: float, blocks: int = BLOCKS) -> tuple[int, ...]:
    """How many of `times` fall into each of equal parts of (start, end]."""
    return tuple(int(count) for count in block_sums(times, np.ones(len(times)), start, end, blocks))


def block_sums(
    times: Sequence[float], amounts: ArrayLike, start: float, end: float, blocks: int = BLOCKS
) -> tuple[float, ...]:
    """What the `amounts` at `times` add up to in each of equal parts of (start, end]."""
    sums, _ = np.histogram(np.asarray(times, float), bins=blocks, range=(start, end), weights=np.asarray(amounts))
    return tuple(float(amount) for amount in sums)


def count_interval(blocks: Sequence[float]) -> Interval:
    """The 95 % interval of how many there would be in such a window in the long run, from one window's block counts.

    Batch means at several batch sizes: the variance of the count in m blocks is taken as a + b m, fitted to
    overlapping sums (Meketon and Schmeiser 1984) of 1, 2, 4 and 8 blocks; b grows with the window and a is what the two
    edges do. So a paced flow, whose counts vary at the edges only, gets the narrow interval that it deserves, where
    plain batch means count an edge for each batch. Student's t with a quarter of the blocks as degrees of freedom, and
    half a call for what is in progress.
    """
    counts = np.asarray(blocks, float)
    n = len(counts)
    total = float(counts.sum())
    if n < _LEAST_SUMS:
        return Interval(0.0, math.inf)
    half = float(stats.t.ppf(0.975, max(4.0, n / 4))) * math.sqrt(_variance_of_sum(counts)) + 0.5
    return Interval(max(0.0, total - half), total + half)


def _variance_of_sum(counts: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    n, mean = len(counts), float(counts.mean())
    sums = np.concatenate([[0.0], np.cumsum(counts)])
    sizes = np.array([m for m in _BLOCK_SUMS if n / m >= _LEAST_SUMS], float)
    variances = np.array(
        [float(np.mean((sums[m:] - sums[:-m] - m * mean) ** 2)) * n / (n - m) for m in sizes.astype(int)]
    )
    if not variances.any():
        return 0.0
    weights = (n / sizes) / np.maximum(variances, 0.05 * variances.max()) ** 2  # each sum's own degrees of freedom
    at_edges, by_block = np.polyfit(sizes, variances, 1, w=np.sqrt(weights))[::-1]
    if by_block < 0:
        return float(np.average(variances, weights=weights))
    if at_edges < 0:
        return float(np.average(variances / sizes, weights=weights * sizes**2)) * n
    return float(at_edges + by_block * n)


def spread(values: Sequence[float]) -> float:
    """Coefficient of variation; 1, as of an exponential, where there are too few to tell, or all are 0."""
    mean = float(np.mean(values)) if len(values) > 1 else 0.0
    return float(np.std(values, ddof=1)) / mean if mean > 0 else 1.0


def settled_from(values: Sequence[float]) -> int:
    """From which of a series' values it is settled: the cut that makes the mean of the rest most certain.

    The marginal standard error rule (MSER, White 1997): the d that minimises var(rest) / len(rest). 0 where it would
    cut half or more (then nothing says that it settles), or where what is cut does not differ from the rest.
    """
    found = np.asarray(values, float)
    n = len(found)
    if n < 8:
        return 0
    rest = [float(found[d:].var()) / (n - d) for d in range(n // 2 + 1)]
    cut = int(np.argmin(rest))
    if cut == 0 or cut >= n // 2:
        return 0
    spread = float(found[cut:].std(ddof=1))
    differs = abs(float(found[:cut].mean() - found[cut:].mean())) > _CLEARLY * spread * math.sqrt(
        1 / cut + 1 / (n - cut)
    )
    return cut if differs else 0
