"""Two answers, or one that is rated: which is likelier, and what training has made likelier.

A reward is the change from the base, so `reward_accuracy` is the tuned model's alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from peft_run.judges.judge import Judge, Seen

if TYPE_CHECKING:
    from torch import nn

    from peft_run.tasks.task import Batch


class PreferenceJudge(Judge):
    tuned_only = ("reward_accuracy",)

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.rated = self.tuned.recipe.task == "kto"
        own = ("reward_accuracy",) if hasattr(self.tuned.model, "disable_adapter") else ()
        self.measures = ("loss", *own) if self.rated else ("loss", "prefers_chosen", "margin", *own)

    def prompt(self, number: int) -> str:
        return "\n".join(f"{message['role']}: {message['content']}" for message in self.samples[number]["messages"])

    def reference(self, number: int) -> str:
        sample = self.samples[number]
        if self.rated:
            return f"{'+' if sample['good'] else '-'} {sample['completion']}"
        return f"+ {sample['chosen']}\n- {sample['rejected']}"

    def judged(self, model: nn.Module, numbers: Sequence[int]) -> list[Seen]:
        batch = self.collate([self.items[i][0] for i in numbers])
        with torch.no_grad():
            sums = self.task.log_probabilities(model, batch).double().cpu()
            rewards = self.rewards(model, batch, sums)
        counts, many = batch["counts"].cpu(), len(numbers)
        found = []
        for row, i in enumerate(numbers):
            stats = {"loss": [-sums[row].item(), float(counts[row])]}  # of the chosen, or the one, answer
            if not self.rated:
                margin = (sums[row] - sums[many + row]).item()
                stats |= {"margin": [margin, 1.0], "prefers_chosen": [float(margin > 0), 1.0]}
            if rewards is not None:
                gain = (rewards[row] - (0 if self.rated else rewards[many + row])).item()
                good = self.samples[i]["good"] if self.rated else True
                stats["reward_accuracy"] = [float((gain > 0) == good), 1.0]
            found.append(Seen(None, stats))
        return found

    def rewards(self, model: nn.Module, batch: Batch, sums: torch.Tensor) -> torch.Tensor | None:
        """How much likelier than for the base each answer is; None where no base is inside."""
        if not hasattr(model, "disable_adapter"):
            return None
        return sums - self.task.base_log_probabilities(model, batch).double().cpu()

    def quality(self, seen: Seen) -> float:
        return seen.stats["margin"][0] if "margin" in seen.stats else super().quality(seen)
