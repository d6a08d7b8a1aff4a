"""What a person should know of data before training on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from peft_run.data.dataset import Dataset, sample_labels
from peft_run.data.formats import Sample

BINS = 8
QUANTILES = (0, 0.5, 0.9, 0.99, 1)


def statistics(dataset: Dataset, lengths: dict[str, list[int]] | None = None) -> dict[str, Any]:
    """Sizes, labels, lengths, duplicates and leakage; `lengths` are token counts by part."""
    parts = {"train": dataset.train, "eval": dataset.eval}
    return {
        "files": [
            {"part": part, **{k: v for k, v in vars(file).items() if k != "sha256"}}
            for part, files in dataset.files.items()
            for file in files
        ],
        "samples": {part: len(samples) for part, samples in parts.items()},
        "labels": {part: balance(samples) for part, samples in parts.items() if balance(samples)},
        "characters": {part: spread([size(s) for s in samples]) for part, samples in parts.items() if samples},
        "tokens": {part: spread(values) for part, values in (lengths or {}).items() if values},
        "duplicates": dataset.duplicates,
        "leaked": dataset.leaked,
    }


def balance(samples: Sequence[Sample]) -> dict[str, int]:
    """label -> samples, most frequent first."""
    counts = Counter(label for sample in samples for label in sample_labels(sample))
    return dict(counts.most_common())


def size(sample: Sample) -> int:
    """Characters of all texts in a sample."""
    return sum(size_of(value) for name, value in sample.items() if name not in ("label", "tags"))


def size_of(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list):
        return sum(size_of(part["content"] if isinstance(part, dict) else part) for part in value)
    return 0


def spread(values: Sequence[int]) -> dict[str, Any]:
    """Quantiles, and a histogram of equal steps: [(from, to, count)]."""
    ordered = sorted(values)
    quantiles = {f"{q:.0%}": ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in QUANTILES}
    low, high = ordered[0], ordered[-1]
    step = max(1, -(-(high - low + 1) // BINS))
    counts = Counter((value - low) // step for value in ordered)
    bins = range((high - low) // step + 1)
    return {"quantiles": quantiles, "histogram": [(low + i * step, low + (i + 1) * step - 1, counts[i]) for i in bins]}
