"""Labels: accuracy, F1 of each, and which is taken for which."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def statistics(answers: Sequence[str | None], references: Sequence[str], labels: Sequence[str]) -> list[float]:
    """(3 labels): how often each is right, is given, is wanted. An answer that is no label is given as none."""
    place = {label: i for i, label in enumerate(labels)}
    counts = np.zeros((3, len(labels)))
    for answer, reference in zip(answers, references, strict=True):
        wanted = place[reference]
        counts[2, wanted] += 1
        if answer in place:
            counts[1, place[answer]] += 1
            counts[0, wanted] += answer == reference
    return counts.ravel().tolist()


def split(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(..., 3 labels) -> right, given, wanted, each (..., labels)"""
    count = sums.shape[-1] // 3
    return sums[..., :count], sums[..., count : 2 * count], sums[..., 2 * count :]


def accuracy(sums: np.ndarray) -> np.ndarray:
    right, _, wanted = split(sums)
    return right.sum(-1) / wanted.sum(-1)


def f1_of_each(sums: np.ndarray) -> np.ndarray:
    """(..., labels); NaN for a label that is neither given nor wanted."""
    right, given, wanted = split(sums)
    with np.errstate(invalid="ignore"):
        return 2 * right / (given + wanted)


def macro_f1(sums: np.ndarray) -> np.ndarray:
    """The mean over the labels that occur."""
    each = f1_of_each(sums)
    known = ~np.isnan(each)
    return np.where(known, each, 0.0).sum(-1) / known.sum(-1)


def confusion(answers: Sequence[str | None], references: Sequence[str], labels: Sequence[str]) -> list[list[int]]:
    """A row for each true label, a column for each given one, and a last column for answers that are no label."""
    place = {label: i for i, label in enumerate(labels)}
    table = [[0] * (len(labels) + 1) for _ in labels]
    for answer, reference in zip(answers, references, strict=True):
        table[place[reference]][place.get(answer, len(labels))] += 1  # type: ignore[arg-type]
    return table
