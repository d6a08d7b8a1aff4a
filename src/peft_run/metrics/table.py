"""Every measure by name: which sums it needs, and how it follows from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from peft_run.metrics import bleu, classes


class Metric(NamedTuple):
    name: str
    stats: str  # the sums it is a function of
    value: Callable[[np.ndarray], np.ndarray]  # (..., k) -> (...)
    higher_is_better: bool = True

    def better(self, difference: float) -> bool:
        return difference > 0 if self.higher_is_better else difference < 0


def mean(sums: np.ndarray) -> np.ndarray:
    """[total, count]"""
    return ratio(sums[..., 0], sums[..., 1])


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """NaN where there is nothing to divide by."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(whole > 0, part / whole, np.nan)


def perplexity(sums: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.exp(mean(sums))


def entity_f1(sums: np.ndarray) -> np.ndarray:
    """[right, found, wanted]"""
    return ratio(2 * sums[..., 0], sums[..., 1] + sums[..., 2])


OVERLAPS = ("rouge1", "rouge2", "rougeL", "bleu")
BY_WORD = "_word"  # the same, with Chinese counted in words

METRICS = {
    metric.name: metric
    for metric in (
        Metric("loss", "loss", mean, False),
        Metric("perplexity", "loss", perplexity, False),
        Metric("accuracy", "classes", classes.accuracy),
        Metric("macro_f1", "classes", classes.macro_f1),
        Metric("entity_f1", "entities", entity_f1),
        Metric("entity_precision", "entities", lambda sums: ratio(sums[..., 0], sums[..., 1])),
        Metric("entity_recall", "entities", lambda sums: ratio(sums[..., 0], sums[..., 2])),
        Metric("exact_match", "exact_match", mean),
        Metric("f1", "f1", mean),
        *(Metric(f"{name}{end}", f"{name}{end}", mean) for end in ("", BY_WORD) for name in OVERLAPS[:3]),
        *(Metric(f"bleu{end}", f"bleu{end}", bleu.value) for end in ("", BY_WORD)),
        Metric("prefers_chosen", "prefers_chosen", mean),
        Metric("reward_accuracy", "reward_accuracy", mean),
        Metric("margin", "margin", mean),
    )
}
