"""Preferences: which of two answers is better (DPO, ORPO), or whether one is good (KTO).

arXiv 2305.18290, 2403.07691 and 2402.01306.

All three need only the log-probabilities of answers, under the model and, for DPO and KTO, under the base, which is
the same model with its adapter off: no second model, and no logits of whole batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from peft_run.config import Recipe
from peft_run.data.formats import Sample
from peft_run.data.render import Item, Renderer
from peft_run.errors import UsageError
from peft_run.tasks.causal_lm import CausalLM
from peft_run.tasks.task import Batch

if TYPE_CHECKING:
    import torch


class Choice(NamedTuple):
    """A prompt with its answers: (chosen, rejected) or, for KTO, one."""

    answers: tuple[Item, ...]
    good: bool

    @property
    def length(self) -> int:
        return max(answer.length for answer in self.answers)


class Preference(CausalLM):
    unit = "samples"

    def __init__(self, recipe: Recipe, renderer: Renderer, labels: list[str]) -> None:
        super().__init__(recipe, renderer, labels)
        self.settings = recipe.preference
        self.plain_text = False

    def encode(self, sample: Sample) -> list[Choice]:
        names = ("completion",) if "completion" in sample else ("chosen", "rejected")
        answers = []
        for name in names:
            messages = [*sample["messages"], {"role": "assistant", "content": sample[name]}]
            answers += self.renderer.items(messages, "last")
        return [Choice(tuple(answers), sample.get("good", True))]

    def shorten(self, item: Any) -> list[Any]:
        return [Choice(tuple(cut for answer in item.answers for cut in super().shorten(answer)), item.good)]

    def check(self, items: Sequence[Any]) -> None:
        super().check([answer for item in items for answer in item.answers])

    def collate(self, items: Sequence[Any]) -> Batch:
        """The answers of all samples as rows, first all first answers; owner: the row of each learnt token."""
        import torch

        rows = [item.answers[i] for i in range(len(items[0].answers)) for item in items]
        batch = super().collate(rows)
        counts = torch.tensor([row.learnt for row in rows])
        batch["owner"] = torch.arange(len(rows)).repeat_interleave(counts)
        batch["counts"] = counts
        batch["good"] = torch.tensor([item.good for item in items])
        return batch | {"units": len(items)}

    def log_probabilities(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Of each row's answer, (rows,)."""
        losses = self.outputs.token_losses(model, batch)
        return losses.new_zeros(len(batch["counts"])).index_add(0, batch["owner"], -losses)

    def rewards(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """How much likelier each answer has become than it is for the base, (rows,) in nats."""
        if not hasattr(model, "disable_adapter"):
            raise UsageError("tasks.needs_adapter", task=self.recipe.task)
        ours = self.log_probabilities(model, batch)
        training = model.training
        model.eval()
        base = self.base_log_probabilities(model, batch)
        model.train(training)
        return ours - base

    def base_log_probabilities(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """The same of the base inside the model."""
        import torch

        with torch.no_grad(), model.disable_adapter():
            return self.log_probabilities(model, batch)

    def losses(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of each sample, and whether the model prefers the right way."""
        raise NotImplementedError

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return self.losses(model, batch)[0].sum()

    def score(self, model: torch.nn.Module, batch: Batch) -> dict[str, float]:
        losses, right = self.losses(model, batch)
        units = batch["units"]
        return {"loss": losses.sum().item(), "units": units, "right": right.sum().item(), "asked": units}


class Dpo(Preference):
    """-log σ(β (reward of chosen - reward of rejected))"""

    def losses(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        from torch.nn.functional import logsigmoid

        chosen, rejected = self.rewards(model, batch).chunk(2)
        return -logsigmoid(self.settings.beta * (chosen - rejected)), chosen > rejected


class Orpo(Preference):
    """-mean log p(chosen) - β log σ(log odds of chosen - log odds of rejected), with p the mean per token."""

    def losses(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        import torch
        from torch.nn.functional import logsigmoid

        mean = self.log_probabilities(model, batch) / batch["counts"]
        odds = mean - torch.log1p(-mean.exp().clamp(max=1 - 1e-6))
        chosen, rejected = odds.chunk(2)
        return -mean.chunk(2)[0] - self.settings.beta * logsigmoid(chosen - rejected), chosen > rejected


class Kto(Preference):
    """w (1 - σ(± β (reward - z))), z the mean divergence from the base, estimated on mismatched prompts and answers."""

    def check(self, items: Sequence[Any]) -> None:
        super().check(items)
        if self.recipe.train.batch < 2:
            raise UsageError("tasks.kto_batch")

    def collate(self, items: Sequence[Any]) -> Batch:
        """Also `mismatched`: every answer after the prompt of the next sample."""
        batch = super().collate(items)
        turned = [*items[1:], items[0]]
        pairs = [(other.answers[0], item.answers[0]) for item, other in zip(items, turned)]
        batch["mismatched"] = super().collate([Choice((joined(*pair, self.max_length),), True) for pair in pairs])
        return batch

    def losses(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        settings, good = self.settings, batch["good"]
        rewards = self.rewards(model, batch)
        with torch.no_grad():
            divergence = self.rewards(model, batch["mismatched"]).mean().clamp(min=0)
        sign = torch.where(good, 1.0, -1.0)
        weight = torch.where(good, settings.desirable_weight, settings.undesirable_weight)
        losses = weight * (1 - torch.sigmoid(sign * settings.beta * (rewards - divergence)))
        return losses, (rewards > 0) == good


def joined(prompt_of: Item, answer_of: Item, limit: int) -> Item:
    """The prompt of one item with the answer of another."""
    from peft_run.data.render import IGNORE

    def start(item: Item) -> int:
        return next(i for i, label in enumerate(item.labels) if label != IGNORE)

    prompt, answer = start(prompt_of), start(answer_of)
    ids = prompt_of.ids[:prompt] + answer_of.ids[answer:]
    labels = prompt_of.labels[:prompt] + answer_of.labels[answer:]
    cut = max(0, len(ids) - limit)  # from the front: the answer is what counts
    return Item(ids[cut:], labels[cut:])
