"""ROUGE (Lin 2004): how much of the reference's n-grams, or of their longest common subsequence, an answer shares.

The F-measure with equal weights, 0 to 1, averaged over samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from peft_run.metrics.overlap import f_measure, ngrams, shared


def rouge_n(answer: Sequence[str], reference: Sequence[str], n: int) -> float:
    ours, theirs = ngrams(answer, n), ngrams(reference, n)
    return f_measure(shared(ours, theirs), ours.total(), theirs.total())


def rouge_l(answer: Sequence[str], reference: Sequence[str]) -> float:
    return f_measure(longest_common(answer, reference), len(answer), len(reference))


def longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence: a row of the usual table is one number, a bit per unit of `a`.

    A 0 bit marks a place of `a` where the length grows; each unit of `b` moves the marks by one addition with carry.
    """
    places: Counter[str] = Counter()
    for i, unit in enumerate(a):
        places[unit] |= 1 << i
    full = (1 << len(a)) - 1
    row = full
    for unit in b:
        matches = row & places[unit]
        row = ((row + matches) | (row - matches)) & full
    return len(a) - row.bit_count()
