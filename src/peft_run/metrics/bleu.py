"""BLEU-4 of a corpus (Papineni et al. 2002), 0 to 1, one reference each, without smoothing.

Where the whole corpus has no n-gram of some length, as with answers of one character, that length is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peft_run.metrics.overlap import ngrams, shared

ORDERS = (1, 2, 3, 4)


def statistics(answer: Sequence[str], reference: Sequence[str]) -> list[float]:
    """[length, reference's length, then for each order: shared, given]"""
    found: list[float] = [len(answer), len(reference)]
    for n in ORDERS:
        ours = ngrams(answer, n)
        found += [shared(ours, ngrams(reference, n)), ours.total()]
    return found


def value(sums: np.ndarray) -> np.ndarray:
    """(..., 10) -> (...)"""
    length, wanted = sums[..., 0], sums[..., 1]
    right, given = sums[..., 2::2], sums[..., 3::2]  # (..., 4)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(given > 0, np.log(right / given), 0.0)
        precision = np.exp(logs.sum(-1) / np.maximum((given > 0).sum(-1), 1))
        brevity = np.exp(np.minimum(0.0, 1 - wanted / length))
    return np.where(length > 0, precision * brevity, 0.0)
