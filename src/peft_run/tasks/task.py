"""What a task has to say: which model it needs, how samples become batches, what the loss of a batch is.

A loss is a sum over units, tokens or samples, and a batch knows how many units it has: so several batches, or several
machines, together give exactly the loss of one large batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from peft_run.config import Recipe
from peft_run.console import Console
from peft_run.data.formats import Sample
from peft_run.data.render import Renderer
from peft_run.errors import UsageError

if TYPE_CHECKING:
    import torch

# Batches are a multiple of this wide. GPUs multiply such shapes faster; CPUs compile and keep a kernel for every shape,
# which with a new length in every batch took 270 MB more on a model of 26M parameters in bfloat16.
WIDTH = 16

Batch = dict[str, Any]  # tensors, and under "units" the number that the loss is divided by


class Task:
    auto_class: ClassVar[str]  # transformers' class with the right output layer
    peft_type: ClassVar[str]  # peft's TaskType
    better: ClassVar[str] = "loss"  # the measure that the best checkpoint is chosen by; lower is better
    unit: ClassVar[str] = "tokens"

    def __init__(self, recipe: Recipe, renderer: Renderer, labels: list[str]) -> None:
        self.recipe, self.renderer, self.labels = recipe, renderer, labels
        self.tokenizer = renderer.tokenizer
        self.max_length = recipe.data.max_length

    def model_settings(self) -> dict[str, Any]:
        """Further arguments for `from_pretrained`: the number of labels and the like."""
        return {}

    def encode(self, sample: Sample) -> list[Any]:
        """The sample as items, each with a `length`."""
        raise NotImplementedError

    def collate(self, items: Sequence[Any]) -> Batch:
        raise NotImplementedError

    def prepare(self, model: torch.nn.Module) -> None:
        """A look at the wrapped model before training and scoring."""

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """The sum of the loss over the units of the batch."""
        raise NotImplementedError

    def score(self, model: torch.nn.Module, batch: Batch) -> dict[str, float]:
        """Sums over the batch: "loss", "units", and pairs such as "right" of "asked"; see `summary`."""
        raise NotImplementedError

    def summary(self, sums: dict[str, float]) -> dict[str, float]:
        """Measures from the sums over all batches."""
        found = {"loss": sums["loss"] / max(sums["units"], 1)}
        if sums.get("asked"):
            found["accuracy"] = sums["right"] / sums["asked"]
        return found

    # -- shared by tasks ----------------------------------------------------------------------------------------------

    def encode_all(self, samples: Sequence[Sample], console: Console, *, training: bool = True) -> list[Any]:
        """All samples as items, with what is too long dealt with and said."""
        what = self.overlong()
        items: list[Any] = []
        longer = 0
        for sample in samples:
            for item in self.encode(sample):
                if item.length <= self.max_length:
                    items.append(item)
                    continue
                longer += 1
                if what == "error":
                    raise UsageError(
                        "template.overlong", count=1, total=len(samples), limit=self.max_length, what="error"
                    )
                if what != "dropped":
                    items += self.shorten(item)
        if longer:
            said = console.text(f"template.{what}")
            console.warn("template.overlong", count=longer, total=len(samples), limit=self.max_length, what=said)
        if samples and not items:
            raise UsageError("template.all_dropped", limit=self.max_length)
        if training:
            self.check(items)
        return items

    def overlong(self) -> str:
        """dropped, cut, split or error. Classifiers cut: the label needs no end of the text."""
        return {"auto": "cut", "truncate": "cut", "drop": "dropped", "error": "error"}[self.recipe.data.overlong]

    def shorten(self, item: Any) -> list[Any]:
        """An overlong item as items that fit."""
        raise NotImplementedError

    def check(self, items: Sequence[Any]) -> None:
        """Refuse what cannot be learnt from."""

    def pad(self, rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
        """(rows, width), filled up on the right; see WIDTH."""
        import torch

        width = -(-max(map(len, rows)) // WIDTH) * WIDTH
        return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])

    def inputs(self, rows: Sequence[Sequence[int]]) -> Batch:
        """input_ids, and an attention mask where there is padding."""
        batch: Batch = {"input_ids": self.pad(rows, self.tokenizer.pad_token_id)}
        if any(len(row) < batch["input_ids"].shape[1] for row in rows):
            batch["attention_mask"] = self.pad([[1] * len(row) for row in rows], 0)
        return batch

    def run(self, model: torch.nn.Module, batch: Batch, *more: str) -> Any:
        """The model's output for the batch's inputs; `more` of the batch goes in where it is there."""
        return model(**{name: batch[name] for name in ("input_ids", "attention_mask", *more) if name in batch})

    def cut(self, ids: Sequence[int], row: Any) -> Any:
        """`row`, as long as the overlong ids, shortened; tokens that close a text, such as [SEP], stay."""
        closing = 1 if ids[-1] in self.renderer.specials else 0
        return row[: self.max_length - closing] + row[len(row) - closing :]

    def label_settings(self) -> dict[str, Any]:
        """The labels, for a model with an output for each."""
        names = dict(enumerate(self.labels))
        return {"num_labels": len(names), "id2label": names, "label2id": {name: i for i, name in names.items()}}


def counted(logits: torch.Tensor, targets: torch.Tensor, units: int) -> dict[str, float]:
    """The sums of `score` where one of several classes, tags or tokens is right: logits (n, classes), targets (n,)."""
    import torch

    return {
        "loss": torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item(),
        "units": units,
        "right": (logits.argmax(1) == targets).sum().item(),
        "asked": units,
    }
