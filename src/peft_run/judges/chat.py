"""Chats and instructions: the loss of the reference's tokens, and the answer that the model writes itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from peft_run.data.render import IGNORE
from peft_run.generation import generate
from peft_run.judges import writing
from peft_run.judges.judge import Judge, Seen

if TYPE_CHECKING:
    from torch import nn


class ChatJudge(Judge):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.prompts = [self.ask(sample) for sample in self.samples]
        self.fit()
        references = [self.reference(i) for i in range(len(self.samples)) if self.prompts[i]]
        self.writing = writing.Writing(references, self.settings, self.console, are_labels=self.learnt_labels())
        self.labels = self.writing.labels
        losses = ("loss", "perplexity") if any(self.items) else ()
        self.measures = (*losses, *(self.writing.measures if any(self.prompts) else ()))

    def encode(self) -> list[list[Any]]:
        """Samples that are only to be answered have nothing to score."""
        return [[] for _ in self.samples] if any("ask" in sample for sample in self.samples) else super().encode()

    def turn(self, sample: dict[str, Any]) -> int:
        """The place of the answer that is asked for: the last one's."""
        return max(i for i, message in enumerate(sample["messages"]) if message["role"] == "assistant")

    def ask(self, sample: dict[str, Any]) -> list[int]:
        """The tokens to answer to, or to go on from; none for plain text that is only scored."""
        if "text" in sample:
            return []
        asked = sample["ask"] if "ask" in sample else sample["messages"][: self.turn(sample)]
        return self.tokenizer(asked)["input_ids"] if isinstance(asked, str) else self.tuned.renderer.prompt(asked)

    def fit(self) -> None:
        """A prompt must leave room for its answer; what is too much goes at the front."""
        most = getattr(self.tuned.model.config, "max_position_embeddings", None)
        room = most - self.settings.generate.max_new_tokens if most else None
        longer = sum(len(prompt) > room for prompt in self.prompts) if room and room > 0 else 0
        if longer:
            self.prompts = [prompt[-room:] for prompt in self.prompts]
            self.console.warn("judge.cut", count=longer, total=len(self.prompts), limit=room)

    def prompt(self, number: int) -> str:
        sample = self.samples[number]
        if "messages" not in sample:
            return sample["text"]
        messages = sample["messages"][: self.turn(sample)]
        if len(messages) == 1:
            return messages[0]["content"]
        return "\n".join(f"{message['role']}: {message['content']}" for message in messages)

    def reference(self, number: int) -> str | None:
        sample = self.samples[number]
        return sample["messages"][self.turn(sample)]["content"] if "messages" in sample else None

    def length(self, number: int) -> int:
        return len(self.prompts[number]) or super().length(number)

    def look(self, model: nn.Module, numbers: Sequence[int]) -> list[Seen]:
        stats = self.losses(model, numbers)
        asked = [i for i in numbers if self.prompts[i]] if self.writing.wanted else []
        answers: dict[int, str] = {}
        if asked:
            prompts = [self.prompts[i] for i in asked]
            settings, seed = self.settings.generate, self.tuned.recipe.train.seed
            answers = dict(
                zip(asked, generate(model, prompts, self.tokenizer, self.tuned.stop_ids, settings, seed), strict=True)
            )
        seen = []
        for i in numbers:
            reference = self.reference(i)
            more = self.writing.statistics(answers[i], reference) if i in answers and reference is not None else {}
            seen.append(Seen(answers.get(i), {**stats.get(i, {}), **more}))
        return seen

    def losses(self, model: nn.Module, numbers: Sequence[int]) -> dict[int, dict[str, list[float]]]:
        """The loss over the learnt tokens of each sample, as in training."""
        rows = [(i, item) for i in numbers for item in self.items[i]]
        if not rows:
            return {}
        batch = self.collate([item for _, item in rows])
        with torch.no_grad():
            each = self.task.outputs.token_losses(model, batch).double().cpu()
        counts = [sum(label != IGNORE for label in item.labels[1:]) for _, item in rows]
        found: dict[int, dict[str, list[float]]] = {}
        for (i, _), part in zip(rows, each.split(counts), strict=True):
            sums = found.setdefault(i, {"loss": [0.0, 0.0]})["loss"]
            sums[0] += part.sum().item()
            sums[1] += len(part)
        return found

    def quality(self, seen: Seen) -> float:
        return (
            self.writing.quality(seen.stats)
            if self.writing.wanted and seen.answer is not None
            else super().quality(seen)
        )
