"""A text from a text, by a model with an encoder and a decoder."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from peft_run.data.formats import Sample
from peft_run.data.render import IGNORE
from peft_run.errors import UsageError
from peft_run.tasks.task import Batch, Task, counted

if TYPE_CHECKING:
    import torch


class Pair(NamedTuple):
    ids: array
    target: array

    @property
    def length(self) -> int:
        return max(len(self.ids), len(self.target))


class Seq2Seq(Task):
    auto_class = "AutoModelForSeq2SeqLM"
    peft_type = "SEQ_2_SEQ_LM"

    def encode(self, sample: Sample) -> list[Pair]:
        ids = array("i", self.tokenizer(sample["source"])["input_ids"])
        target = self.tokenizer(text_target=sample.get("target", ""))["input_ids"]
        end = self.tokenizer.eos_token_id
        if end is not None and (not target or target[-1] != end):
            target = [*target, end]
        return [Pair(ids, array("i", target))]

    def shorten(self, item: Pair) -> list[Pair]:
        """The end of a long source goes; a cut target would teach the model not to stop."""
        if len(item.target) > self.max_length:
            return []
        return [Pair(self.cut(item.ids, item.ids), item.target)]

    def check(self, items: Sequence[Pair]) -> None:
        if not any(self.tokenizer.eos_token_id in item.target for item in items):
            raise UsageError("template.no_stop")

    def collate(self, items: Sequence[Pair]) -> Batch:
        batch = self.inputs([item.ids for item in items])
        units = sum(len(item.target) for item in items)
        labels = self.pad([item.target for item in items], IGNORE)
        return batch | {"labels": labels, "units": units, "tokens": sum(map(len, batch["input_ids"])) + units}

    def logits(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(target tokens, vocabulary) and these tokens."""
        logits = self.run(model, batch, "labels").logits
        known = batch["labels"] != IGNORE
        return logits[:, -known.shape[1] :][known].float(), batch["labels"][known]

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        import torch

        return torch.nn.functional.cross_entropy(*self.logits(model, batch), reduction="sum")

    def score(self, model: torch.nn.Module, batch: Batch) -> dict[str, float]:
        return counted(*self.logits(model, batch), batch["units"])
