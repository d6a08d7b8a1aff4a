"""A label for a text, from a new output layer that is trained with the adapter."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from peft_run.data.formats import Sample
from peft_run.tasks.task import Batch, Task

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
        names = dict(enumerate(self.labels))
        return {"num_labels": len(names), "id2label": names, "label2id": {name: i for i, name in names.items()}}

    def encode(self, sample: Sample) -> list[Labelled]:
        coded = self.tokenizer(sample["text"], sample.get("pair"))
        ids = array("i", coded["input_ids"] or [self.tokenizer.pad_token_id])
        kinds = array("i", coded["token_type_ids"]) if "token_type_ids" in coded else None
        # Without a label the sample is one to be answered.
        return [Labelled(ids, self.labels.index(sample["label"]) if "label" in sample else -1, kinds)]

    def shorten(self, item: Labelled) -> list[Labelled]:
        """The end of the text goes; the tokens that close a text, such as [SEP], stay."""
        closing = 1 if item.ids[-1] in self.renderer.specials else 0

        def cut(row: array) -> array:
            return row[: self.max_length - closing] + row[len(row) - closing :]

        return [Labelled(cut(item.ids), item.label, cut(item.kinds) if item.kinds is not None else None)]

    def collate(self, items: Sequence[Labelled]) -> Batch:
        import torch

        batch = self.inputs([item.ids for item in items])
        if items[0].kinds is not None:
            batch["token_type_ids"] = self.pad([item.kinds for item in items], 0)
        labels = torch.tensor([item.label for item in items])
        return batch | {"targets": labels, "units": len(items), "tokens": sum(item.length for item in items)}

    def logits(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """(samples, labels)"""
        names = ("input_ids", "attention_mask", "token_type_ids")
        return model(**{name: batch[name] for name in names if name in batch}).logits.float()

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        import torch

        return torch.nn.functional.cross_entropy(self.logits(model, batch), batch["targets"], reduction="sum")

    def score(self, model: torch.nn.Module, batch: Batch) -> dict[str, float]:
        import torch

        logits = self.logits(model, batch)
        loss = torch.nn.functional.cross_entropy(logits, batch["targets"], reduction="sum").item()
        right = (logits.argmax(1) == batch["targets"]).sum().item()
        return {"loss": loss, "units": batch["units"], "right": right, "asked": batch["units"]}
