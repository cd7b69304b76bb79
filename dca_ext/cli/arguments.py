"""Types of command line arguments: what is refused is refused in a sentence that says what was expected."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

#: The largest int of the kernels' interfaces.
INT_MAX = 2**31 - 1


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """A type for argparse: whole numbers from low to high, both included."""
    expected = f"must be a whole number, at least {low}" if high is None else f"must be from {low} to {high}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"{expected}; got {text}")
        return value

    return parse


positive = integer(1)
positive_int = integer(1, INT_MAX)


def not_negative_number(text: str) -> float:
    """A finite number, 0 or more."""
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number, 0 or more; got {text}")
    return value


def positive_number(text: str) -> float:
    """A finite number above 0."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number above 0; got {text}")
    return value


def _number(text: str) -> float:
    """NaN where the text is no number."""
    try:
        return float(text)
    except ValueError:
        return math.nan
