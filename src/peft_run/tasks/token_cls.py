"""A tag for every token of a text that is split already: names, parts of speech."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from peft_run.data.formats import Sample
from peft_run.data.render import IGNORE
from peft_run.tasks.task import Batch, Task, counted

if TYPE_CHECKING:
    import torch

OUTSIDE = "O"


class Tagged(NamedTuple):
    ids: array
    labels: array  # the tag of each token of the user's that begins here, else IGNORE

    @property
    def length(self) -> int:
        return len(self.ids)


class TokenClassification(Task):
    auto_class = "AutoModelForTokenClassification"
    peft_type = "TOKEN_CLS"
    unit = "tags"

    def model_settings(self) -> dict[str, Any]:
        return self.label_settings()

    def encode(self, sample: Sample) -> list[Tagged]:
        """Each of the user's tokens is tokenized on its own and carries its tag on the first piece.

        A left-to-right model has seen only that piece and what is before it; the last piece would know more, but
        bidirectional models, which the task suits better, do not care.
        """
        ids, labels = array("i"), array("i")
        for number, token in enumerate(sample["tokens"]):
            pieces = self.tokenizer(token, add_special_tokens=False)["input_ids"]
            if not pieces:
                continue
            tag = self.labels.index(sample["tags"][number]) if "tags" in sample else 0
            ids.extend(pieces)
            labels.extend([tag, *[IGNORE] * (len(pieces) - 1)])
        opening, closing = self.frame()
        return [
            Tagged(
                array("i", [*opening, *ids, *closing]),
                array("i", [*[IGNORE] * len(opening), *labels, *[IGNORE] * len(closing)]),
            )
        ]

    def frame(self) -> tuple[list[int], list[int]]:
        """The special tokens that this tokenizer puts around a text."""
        inner = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        outer = self.tokenizer("a")["input_ids"]
        start = next((i for i in range(len(outer)) if outer[i : i + len(inner)] == inner), 0)
        return outer[:start], outer[start + len(inner) :]

    def shorten(self, item: Tagged) -> list[Tagged]:
        return [Tagged(item.ids[: self.max_length], item.labels[: self.max_length])]

    def collate(self, items: Sequence[Tagged]) -> Batch:
        batch = self.inputs([item.ids for item in items])
        labels = self.pad([item.labels for item in items], IGNORE)
        units = int((labels != IGNORE).sum())
        return batch | {"targets": labels, "units": units, "tokens": sum(item.length for item in items)}

    def logits(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(tagged tokens, tags) and the true tags of these tokens."""
        logits = self.run(model, batch).logits
        known = batch["targets"] != IGNORE
        return logits[:, -known.shape[1] :][known].float(), batch["targets"][known]

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        import torch

        return torch.nn.functional.cross_entropy(*self.logits(model, batch), reduction="sum")

    def score(self, model: torch.nn.Module, batch: Batch) -> dict[str, float]:
        """Besides all tags, those other than O: most tags are, and are easy."""
        import torch

        logits, targets = self.logits(model, batch)
        right = logits.argmax(1) == targets
        inside = targets != self.labels.index(OUTSIDE) if OUTSIDE in self.labels else torch.ones_like(right)
        return {
            **counted(logits, targets, batch["units"]),
            "right_inside": right[inside].sum().item(),
            "inside": inside.sum().item(),
        }

    def summary(self, sums: dict[str, float]) -> dict[str, float]:
        inside = {"accuracy_inside": sums["right_inside"] / sums["inside"]} if sums.get("inside") else {}
        return super().summary(sums) | inside
