"""Chats, instructions and plain text: the next token, at the places that are learnt and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peft_run.data.formats import Sample
from peft_run.data.render import IGNORE, Item
from peft_run.errors import UsageError
from peft_run.tasks.task import Batch, Task

if TYPE_CHECKING:
    import torch

SHOWN = 3


class CausalLM(Task):
    auto_class = "AutoModelForCausalLM"
    peft_type = "CAUSAL_LM"

    def encode(self, sample: Sample) -> list[Item]:
        if "text" in sample:
            return [self.renderer.document(sample["text"])]
        return self.renderer.items(sample["messages"], self.recipe.data.train_on)

    def overlong(self) -> str:
        """A cut answer would teach the model not to stop, so chats are dropped; plain text goes on in the next row."""
        if self.recipe.data.overlong == "auto":
            return "split" if self.plain_text else "dropped"
        return super().overlong()

    def encode_all(self, samples: Sequence[Sample], *rest: Any, **settings: Any) -> list[Item]:
        self.plain_text = any("text" in sample for sample in samples)
        return super().encode_all(samples, *rest, **settings)

    def shorten(self, item: Item) -> list[Item]:
        step = self.max_length
        starts = range(0, item.length, step) if self.overlong() == "split" else [0]
        return [Item(item.ids[start : start + step], item.labels[start : start + step]) for start in starts]

    def check(self, items: Sequence[Item]) -> None:
        # The first token has nothing before it that it could be predicted from.
        empty = [number for number, item in enumerate(items, 1) if all(label == IGNORE for label in item.labels[1:])]
        if empty:
            rows = ", ".join(map(str, empty[:SHOWN])) + (", ..." if len(empty) > SHOWN else "")
            raise UsageError("template.nothing_learnt", count=len(empty), total=len(items), rows=rows)
        if not self.plain_text:
            stops = self.renderer.specials | {self.tokenizer.eos_token_id}
            if not any(label in stops for item in items for label in item.labels):
                raise UsageError("template.no_stop")
        start = self.tokenizer.bos_token_id
        if start is not None and all(item.ids[:2].tolist() == [start, start] for item in items):
            raise UsageError("template.two_starts")

    def collate(self, items: Sequence[Item]) -> Batch:
        """at: the places whose next token is learnt, in the flattened batch; targets: those tokens."""
        import torch

        rows = [item.ids for item in items]
        if self.recipe.data.packing:
            batch: Batch = {
                "input_ids": torch.tensor([[token for row in rows for token in row]]),
                "position_ids": torch.tensor([[place for row in rows for place in range(len(row))]]),
            }
            starts = [0]
            for row in rows[:-1]:
                starts.append(starts[-1] + len(row))
        else:
            batch = self.inputs(rows)
            width = batch["input_ids"].shape[1]
            starts = [width * number for number in range(len(rows))]
        at, targets = [], []
        for start, item in zip(starts, items):
            for place, label in enumerate(item.labels[1:]):
                if label != IGNORE:
                    at.append(start + place)
                    targets.append(label)
        batch |= {"at": torch.tensor(at), "targets": torch.tensor(targets)}
        return batch | {"units": len(at), "tokens": sum(map(len, rows))}

    def prepare(self, model: torch.nn.Module) -> None:
        from peft_run.train.outputs import Outputs

        self.outputs = Outputs(model)

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return self.outputs.token_losses(model, batch).sum()

    def score(self, model: torch.nn.Module, batch: Batch) -> dict[str, float]:
        losses, right = self.outputs.token_losses(model, batch, count_right=True)
        return {"loss": losses.sum().item(), "units": batch["units"], "right": float(right), "asked": batch["units"]}
