"""A text from a text: the loss of the reference's tokens, and the text that the model writes itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from peft_run.generation import write
from peft_run.judges.judge import Judge, Seen
from peft_run.judges.writing import Writing

if TYPE_CHECKING:
    from torch import nn


class Seq2SeqJudge(Judge):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        references = [sample.get("target") for sample in self.samples]
        self.writing = Writing(references, self.settings, self.console, are_labels=self.learnt_labels())
        self.labels = self.writing.labels
        self.measures = ("loss", "perplexity", *self.writing.measures)

    def prompt(self, number: int) -> str:
        return self.samples[number]["source"]

    def reference(self, number: int) -> str | None:
        return self.samples[number].get("target")

    def judged(self, model: nn.Module, numbers: Sequence[int]) -> list[Seen]:
        batch = self.collate([self.items[i][0] for i in numbers])
        with torch.no_grad():
            losses = cross_entropy(*self.task.logits(model, batch), reduction="none").double().cpu()
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        settings, seed = self.settings.generate, self.tuned.recipe.train.seed
        texts = write(model, inputs, self.tokenizer, self.tuned.stop_ids, settings, seed)
        seen = []
        parts = losses.split([len(self.items[i][0].target) for i in numbers])
        for i, part, text in zip(numbers, parts, texts, strict=True):
            reference = self.reference(i)
            stats = {}
            if reference is not None:
                stats = {"loss": [part.sum().item(), float(len(part))], **self.writing.statistics(text, reference)}
            seen.append(Seen(text, stats))
        return seen

    def quality(self, seen: Seen) -> float:
        return self.writing.quality(seen.stats)
