"""How sure a measure is: intervals by the bootstrap; whether two models differ, by exchanging answers at random.

Both draw whole samples, with a fixed seed; so the same figures always get the same intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

ROUNDS = 2000
CHUNK = 1 << 22  # numbers drawn at a time
CONFIDENCE = 0.95

Value = Callable[[np.ndarray], np.ndarray]  # (..., k) sums -> (...)


def interval(stats: np.ndarray, value: Value, seed: int = 0) -> tuple[float, float] | None:
    """The 95 % interval of the measure of these samples, (samples, k). None for a single sample."""
    if len(stats) < 2:
        return None
    return middle(np.concatenate([value(weights @ stats) for weights in redrawn(len(stats), seed)]))


def difference(base: np.ndarray, tuned: np.ndarray, value: Value, seed: int = 0) -> tuple[float, float] | None:
    """The 95 % interval of tuned - base, with the same samples drawn for both."""
    if len(base) < 2:
        return None
    drawn = [value(weights @ tuned) - value(weights @ base) for weights in redrawn(len(base), seed)]
    return middle(np.concatenate(drawn))


def chance(base: np.ndarray, tuned: np.ndarray, value: Value, seed: int = 0) -> float:
    """p: how often a difference this large comes about when it is left to chance which answer is whose."""
    seen = abs(value(tuned.sum(0)) - value(base.sum(0)))
    rng = np.random.default_rng(seed)
    change = tuned - base
    at_least = 0
    for rounds in chunks(len(base)):
        swapped = rng.integers(0, 2, (rounds, len(base))).astype(float) @ change
        gaps = np.abs(value(tuned.sum(0) - swapped) - value(base.sum(0) + swapped))
        at_least += int((gaps >= seen - 1e-12).sum())
    return (1 + at_least) / (1 + ROUNDS)


def redrawn(count: int, seed: int) -> Iterator[np.ndarray]:
    """(rounds, count): how often each sample is drawn, in pieces."""
    rng = np.random.default_rng(seed)
    for rounds in chunks(count):
        yield rng.multinomial(count, np.full(count, 1 / count), size=rounds).astype(float)


def chunks(count: int) -> Iterator[int]:
    step = max(1, min(ROUNDS, CHUNK // count))
    for start in range(0, ROUNDS, step):
        yield min(step, ROUNDS - start)


def middle(values: np.ndarray) -> tuple[float, float]:
    if np.isnan(values).all():
        return float("nan"), float("nan")
    outside = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(values, [outside, 1 - outside])
    return float(low), float(high)
