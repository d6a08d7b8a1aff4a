"""Counting what two sequences share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def ngrams(units: Sequence[str], n: int) -> Counter:
    return Counter(tuple(units[i : i + n]) for i in range(len(units) - n + 1))


def shared(a: Counter, b: Counter) -> int:
    """Each n-gram counts as often as it is in both."""
    return (a & b).total()


def f_measure(right: float, given: float, wanted: float) -> float:
    """2 right / (given + wanted): the harmonic mean of precision and recall. Nothing of nothing is perfect."""
    return 2 * right / (given + wanted) if given + wanted else 1.0
