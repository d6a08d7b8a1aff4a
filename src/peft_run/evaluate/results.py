"""From what each side made of the samples to figures, intervals and the samples worth reading."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from peft_run.errors import UsageError
from peft_run.judges.judge import Judge, Seen
from peft_run.metrics import classes, resample
from peft_run.metrics.table import METRICS, Metric

SURE = 0.05  # p below which a difference counts
SHOWN = 5  # samples in each list
FORGETTING = "forgetting"  # for --fail-under: how many times as high the perplexity of general text has become


def chosen(judge: Judge, asked: list[str] | str) -> list[Metric]:
    """The measures that the recipe asks for, of those that the task has."""
    names = judge.measures if asked == "auto" else asked
    for name in names:
        if name not in judge.measures:
            raise unknown(name, judge.measures)
    return [METRICS[name] for name in names]


def check_wanted(wanted: Sequence[str], measures: Sequence[Metric], texts: dict[str, Any]) -> None:
    known = [metric.name for metric in measures] + ([FORGETTING] if texts else [])
    for name in wanted:
        if name not in known:
            raise unknown(name, known)


def unknown(name: str, known: Sequence[str]) -> UsageError:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0) or [""]
    return UsageError("evaluate.no_metric", name=name, known=", ".join(known), nearest=near[0])


class Results:
    def __init__(
        self, judge: Judge, sides: Sequence[str], seen: dict[str, list[Seen]], measures: Sequence[Metric]
    ) -> None:
        self.judge, self.sides, self.seen, self.measures = judge, sides, seen, measures

    # -- figures ------------------------------------------------------------------------------------------------------

    def arrays(self, stats: str) -> dict[str, np.ndarray]:
        """side -> (samples, k), over the samples that have these numbers, which are the same on both sides."""
        return {
            side: np.array([one.stats[stats] for one in self.seen[side] if stats in one.stats]) for side in self.sides
        }

    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = {"metrics": {}}
        for metric in self.measures:
            arrays = self.arrays(metric.stats)
            if metric.name in self.judge.tuned_only:
                arrays.pop("base", None)
            if len(arrays["tuned"]):
                found["metrics"][metric.name] = compared(metric, arrays)
        if self.judge.labels and len(self.arrays("classes")["tuned"]):
            found |= self.by_label()
        return found

    def by_label(self) -> dict[str, Any]:
        """F1 of each label, the confusion of labels, and what the commonest label alone would reach."""
        labels = list(self.judge.labels)
        pairs = {side: self.pairs(side) for side in self.sides}
        references = pairs["tuned"][1]
        f1 = {side: classes.f1_of_each(self.arrays("classes")[side].sum(0)) for side in self.sides}
        label, count = Counter(references).most_common(1)[0]
        return {
            "labels": labels,
            "support": [references.count(label) for label in labels],
            "f1_of_labels": {side: [number(value) for value in f1[side]] for side in self.sides},
            "confusion": {side: classes.confusion(*pairs[side], labels) for side in self.sides},
            "commonest": {"label": label, "accuracy": count / len(references)},
        }

    def pairs(self, side: str) -> tuple[list[str], list[str]]:
        """Given and true labels of all samples, or of all their tokens."""
        answers: list[str] = []
        references: list[str] = []
        for i, one in enumerate(self.seen[side]):
            if "classes" in one.stats:
                answer, reference = one.answer, self.judge.reference(i)
                answers += answer if isinstance(answer, list) else [answer.strip()]
                references += reference if isinstance(reference, list) else [reference.strip()]
        return answers, references

    # -- samples ------------------------------------------------------------------------------------------------------

    def rows(self) -> list[dict[str, Any]]:
        """A line of evaluation.jsonl for each sample."""
        from peft_run.data.dataset import key_of

        found = []
        for i, sample in enumerate(self.judge.samples):
            row = {"number": i, "key": key_of(sample), "prompt": self.judge.prompt(i)}
            row["reference"] = self.judge.reference(i)
            for side in self.sides:
                one = self.seen[side][i]
                row[side] = {"answer": one.answer, "measures": self.of_one(one, side), **one.more}
                if one.stats:
                    row[side]["quality"] = number(self.judge.quality(one))
            found.append(row)
        return found

    def of_one(self, one: Seen, side: str) -> dict[str, float | None]:
        names = [m for m in self.measures if m.stats in one.stats and m.name != "macro_f1"]
        if side == "base":
            names = [m for m in names if m.name not in self.judge.tuned_only]
        return {metric.name: number(metric.value(np.array(one.stats[metric.stats]))) for metric in names}

    def picks(self) -> dict[str, list[int]]:
        """Numbers of the best, the worst and the most changed samples."""
        known = [i for i in range(len(self.judge.samples)) if all(self.seen[side][i].stats for side in self.sides)]
        quality = {side: {i: self.judge.quality(self.seen[side][i]) for i in known} for side in self.sides}
        tuned = quality["tuned"]
        order = sorted(known, key=lambda i: (-tuned[i], i))
        found = {"best": order[:SHOWN], "worst": order[::-1][:SHOWN]}
        if "base" in self.sides:
            changed = sorted(known, key=lambda i: (-abs(tuned[i] - quality["base"][i]), i))
            found["changed"] = changed[:SHOWN]
        return found


def compared(metric: Metric, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """A measure of each side with its interval, and whether the difference can be chance."""
    found: dict[str, Any] = {"higher_is_better": metric.higher_is_better, "samples": len(arrays["tuned"])}
    for side, stats in arrays.items():
        found[side] = number(metric.value(stats.sum(0)))
        found[f"{side}_interval"] = pair(resample.interval(stats, metric.value))
    if "base" in arrays:
        found |= versus(metric, arrays["base"], arrays["tuned"])
    return found


def versus(metric: Metric, base: np.ndarray, tuned: np.ndarray) -> dict[str, Any]:
    """tuned - base over the same samples."""
    gap = float(metric.value(tuned.sum(0)) - metric.value(base.sum(0)))
    p = resample.chance(base, tuned, metric.value) if math.isfinite(gap) else None
    verdict = "unclear" if p is None or p >= SURE else "better" if metric.better(gap) else "worse"
    interval = pair(resample.difference(base, tuned, metric.value))
    return {"difference": number(gap), "difference_interval": interval, "p": p, "verdict": verdict}


def number(value: Any) -> float | None:
    """For JSON, which has no NaN and no infinity."""
    value = float(value)
    return value if math.isfinite(value) else None


def pair(interval: tuple[float, float] | None) -> list[float | None] | None:
    return None if interval is None else [number(end) for end in interval]
