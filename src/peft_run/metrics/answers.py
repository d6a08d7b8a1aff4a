"""Short answers: exactly the reference, or how many of its words (Chinese: characters) they share.

Case, punctuation, full-width forms and English articles do not count.
"""

from __future__ import annotations

from collections import Counter

from peft_run.metrics.overlap import f_measure, shared
from peft_run.metrics.units import characters

ARTICLES = {"a", "an", "the"}


def plain(answer: str) -> list[str]:
    """The units that count; all of them where nothing else is left, as with an answer that is only punctuation."""
    units = [unit for unit in characters(answer, fold=True) if unit not in ARTICLES]
    return units or characters(answer)


def exact(answer: str, reference: str) -> float:
    return float(plain(answer) == plain(reference))


def f1(answer: str, reference: str) -> float:
    ours, theirs = Counter(plain(answer)), Counter(plain(reference))
    return f_measure(shared(ours, theirs), ours.total(), theirs.total())
