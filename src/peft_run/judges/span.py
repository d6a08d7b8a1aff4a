"""The answer as a span of the text: of all its windows, the span that is likeliest against "not here"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from peft_run.judges.judge import Judge, Seen
from peft_run.metrics import answers
from peft_run.tasks.qa import HIDDEN, best_spans

if TYPE_CHECKING:
    from torch import nn

    from peft_run.tasks.qa import Window


class SpanJudge(Judge):
    measures = ("loss", "exact_match", "f1")

    def prompt(self, number: int) -> str:
        sample = self.samples[number]
        return f"{sample['question']}\n{sample['context']}"

    def reference(self, number: int) -> str | None:
        return self.samples[number].get("answer")

    def look(self, model: nn.Module, numbers: Sequence[int]) -> list[Seen]:
        windows = [(i, window) for i in numbers for window in self.items[i]]
        found: dict[int, list[tuple[float, int, int, float]]] = {i: [] for i in numbers}
        size = self.settings.batch  # a long text alone may have more windows than a batch has samples
        for start in range(0, len(windows), size):
            part = windows[start : start + size]
            for (i, _), candidate in zip(part, self.candidates(model, [w for _, w in part]), strict=True):
                found[i].append(candidate)
        return [self.seen(i, found[i]) for i in numbers]

    def candidates(self, model: nn.Module, windows: list[Window]) -> list[tuple[float, int, int, float]]:
        """(score, first character, end, loss) of each window's best span."""
        batch = self.collate(windows)
        with torch.no_grad():
            start, end = self.task.logits(model, batch)
        losses = (
            cross_entropy(start, batch["start"], reduction="none") + cross_entropy(end, batch["end"], reduction="none")
        ) / 2
        nothing = (start[:, 0] + end[:, 0]).tolist()
        start[:, 0] = end[:, 0] = HIDDEN  # an answer is wanted
        rows = []
        for row, (window, (first, last)) in enumerate(zip(windows, best_spans(start, end), strict=True)):
            score = (start[row, first] + end[row, last]).item() - nothing[row]
            if first < window.first:  # nothing in this window can be an answer
                rows.append((float("-inf"), 0, 0, losses[row].item()))
                continue
            places = window.places[first - window.first], window.places[last - window.first]
            rows.append((score, places[0][0], places[1][1], losses[row].item()))
        return rows

    def seen(self, number: int, candidates: list[tuple[float, int, int, float]]) -> Seen:
        if not candidates:
            return Seen()
        score, start, end, _ = max(candidates, key=lambda candidate: candidate[0])
        answer, reference = self.samples[number]["context"][start:end], self.reference(number)
        stats: dict[str, Any] = {}
        if reference is not None:
            stats = {
                "loss": [sum(candidate[3] for candidate in candidates), float(len(candidates))],
                "exact_match": [answers.exact(answer, reference), 1.0],
                "f1": [answers.f1(answer, reference), 1.0],
            }
        return Seen(answer, stats, {"start": start, "score": round(score, 4)})
