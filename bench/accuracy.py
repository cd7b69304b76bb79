"""How far a result is from what it should be."""

from __future__ import annotations

from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected; not a number where either is not."""
    difference = expected_square = 0.0
    for a, e in zip(actual.split(8192, dim=1), expected.split(8192, dim=1), strict=True):
        difference += float((a.double() - e.double()).square().sum())
        expected_square += float(e.double().square().sum())
    return (difference / expected_square) ** 0.5 if expected_square else float("nan")
