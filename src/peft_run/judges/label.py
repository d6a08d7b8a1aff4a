"""A label for a text, from the output layer of a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from peft_run.judges.judge import Judge, Seen
from peft_run.metrics import classes

if TYPE_CHECKING:
    from torch import nn


class LabelJudge(Judge):
    measures = ("loss", "accuracy", "macro_f1")

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.labels = self.tuned.labels

    def prompt(self, number: int) -> str:
        sample = self.samples[number]
        return sample["text"] + (f"\n{sample['pair']}" if sample.get("pair") else "")

    def reference(self, number: int) -> str | None:
        return self.samples[number].get("label")

    def judged(self, model: nn.Module, numbers: Sequence[int]) -> list[Seen]:
        with torch.no_grad():
            logits = self.task.logits(model, self.collate([self.items[i][0] for i in numbers]))
        rows = logits.double().log_softmax(-1).cpu()
        return [self.seen(i, row) for i, row in zip(numbers, rows, strict=True)]

    def seen(self, number: int, row: torch.Tensor) -> Seen:
        """row: the log-probability of each label."""
        answer, reference = self.labels[int(row.argmax())], self.reference(number)
        stats = {}
        if reference is not None:
            loss = -row[self.labels.index(reference)].item()
            stats = {"loss": [loss, 1.0], "classes": classes.statistics([answer], [reference], self.labels)}
        probabilities = {label: round(p, 6) for label, p in zip(self.labels, row.exp().tolist(), strict=True)}
        return Seen(answer, stats, {"probabilities": probabilities})
