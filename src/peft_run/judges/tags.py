"""A tag for each token of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from peft_run.data.render import IGNORE
from peft_run.judges.judge import Judge, Seen
from peft_run.metrics import classes, spans
from peft_run.tasks.token_cls import OUTSIDE

if TYPE_CHECKING:
    from torch import nn


class TagJudge(Judge):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.labels = self.tuned.labels
        self.scheme = spans.scheme(self.labels)
        has_entities = spans.has_entities(self.labels)
        own = ("entity_f1", "entity_precision", "entity_recall") if has_entities else ("macro_f1",)
        self.measures = ("loss", "accuracy", *own)
        # What a token gets that the model does not see: no text in it, or behind the end.
        self.unseen = OUTSIDE if OUTSIDE in self.labels else self.labels[0]

    def prompt(self, number: int) -> str:
        return " ".join(self.samples[number]["tokens"])

    def reference(self, number: int) -> list[str] | None:
        return self.samples[number].get("tags")

    def judged(self, model: nn.Module, numbers: Sequence[int]) -> list[Seen]:
        items = [self.items[i][0] for i in numbers]
        with torch.no_grad():
            logits, targets = self.task.logits(model, self.collate(items))
        losses = cross_entropy(logits, targets, reduction="none").double().cpu()
        counts = [sum(label != IGNORE for label in item.labels) for item in items]
        parts = zip(logits.argmax(1).cpu().split(counts), losses.split(counts), strict=True)
        return [self.seen(i, tags.tolist(), part) for i, (tags, part) in zip(numbers, parts, strict=True)]

    def seen(self, number: int, tags: list[int], losses: torch.Tensor) -> Seen:
        tokens, reference = self.samples[number]["tokens"], self.reference(number)
        answer = [self.unseen] * len(tokens)
        places = [i for i, token in enumerate(tokens) if self.tokenizer(token, add_special_tokens=False)["input_ids"]]
        for place, tag in zip(places, tags):  # fewer tags than places where the end was cut
            answer[place] = self.labels[tag]
        stats = {}
        if reference is not None:
            stats = {
                "loss": [losses.sum().item(), float(len(losses))],
                "classes": classes.statistics(answer, reference, self.labels),
                "entities": spans.statistics(answer, reference, self.scheme),
            }
        found = sorted(spans.entities(answer, self.scheme), key=lambda entity: entity[1])
        entities = [{"type": kind, "start": a, "end": b + 1, "tokens": tokens[a : b + 1]} for kind, a, b in found]
        return Seen(answer, stats, {"entities": entities})
