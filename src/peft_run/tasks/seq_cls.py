"""A label for a text, from a new output layer that is trained with the adapter."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from peft_run.data.formats import Sample
from peft_run.tasks.task import Batch, Task, counted

if TYPE_CHECKING:
    import torch


class Labelled(NamedTuple):
    ids: array
    label: int
    kinds: array | None  # token_type_ids of a pair of texts, where the model has them

    @property
    def length(self) -> int:
        return len(self.ids)


class SequenceClassification(Task):
    auto_class = "AutoModelForSequenceClassification"
    peft_type = "SEQ_CLS"
    unit = "samples"

    def model_settings(self) -> dict[str, Any]:
        return self.label_settings()

    def encode(self, sample: Sample) -> list[Labelled]:
        coded = self.tokenizer(sample["text"], sample.get("pair"))
        ids = array("i", coded["input_ids"] or [self.tokenizer.pad_token_id])
        kinds = array("i", coded["token_type_ids"]) if "token_type_ids" in coded else None
        # Without a label the sample is one to be answered.
        return [Labelled(ids, self.labels.index(sample["label"]) if "label" in sample else -1, kinds)]

    def shorten(self, item: Labelled) -> list[Labelled]:
        """The end of the text goes."""
        kinds = None if item.kinds is None else self.cut(item.ids, item.kinds)
        return [Labelled(self.cut(item.ids, item.ids), item.label, kinds)]

    def collate(self, items: Sequence[Labelled]) -> Batch:
        import torch

        batch = self.inputs([item.ids for item in items])
        if items[0].kinds is not None:
            batch["token_type_ids"] = self.pad([item.kinds for item in items], 0)
        labels = torch.tensor([item.label for item in items])
        return batch | {"targets": labels, "units": len(items), "tokens": sum(item.length for item in items)}

    def logits(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """(samples, labels)"""
        return self.run(model, batch, "token_type_ids").logits.float()

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        import torch

        return torch.nn.functional.cross_entropy(self.logits(model, batch), batch["targets"], reduction="sum")

    def score(self, model: torch.nn.Module, batch: Batch) -> dict[str, float]:
        return counted(self.logits(model, batch), batch["targets"], batch["units"])
