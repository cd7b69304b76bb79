"""What is said of repeated timings: quantiles, and the ratio of calls that were neighbours in time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def quantile(values: Sequence[float], share: float) -> float:
    """Value at `share` of the sorted values, between neighbours linearly."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    below = int(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (at - below) * (ordered[above] - ordered[below])


def median_of_ratios(pairs: Iterable[tuple[float, float]]) -> float:
    """Median of second / first over (first, second): a machine whose speed drifts slows both of a pair."""
    return quantile([second / first for first, second in pairs], 0.5)
