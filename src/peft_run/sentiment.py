"""The task of the demo: say whether a Chinese review is positive or negative, in a fixed form of answer."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from peft_run.reviews import Review

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Chat markup would make a short review half as long again (64 -> 94 tokens), and with it the time.
PROMPT = "评论：{}\n情感："
ANSWERS = {True: "正面", False: "负面"}

Batch = dict[str, "torch.Tensor"]


class Score(NamedTuple):
    loss: float  # mean over the tokens of the answers
    accuracy: float


class SentimentTask:
    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        # The end token is learnt too: the tuned model answers and stops.
        self.answers = {k: tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for k, text in ANSWERS.items()}
        self.answer_length = len(self.answers[True])
        assert self.answer_length == len(self.answers[False])
        assert self.answers[True][0] != self.answers[False][0]

    def prompt(self, review: Review) -> list[int]:
        return self.tokenizer(prompt_text(review))["input_ids"]

    def batch(self, reviews: Sequence[Review]) -> Batch:
        return self.pad([self.prompt(review) + self.answers[review.positive] for review in reviews])

    def pad(self, rows: list[list[int]]) -> Batch:
        """On the left, so that all rows end together and the answers are one slice of the batch."""
        return self.tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")

    def batches(self, reviews: Sequence[Review], size: int, seed: int) -> Iterator[Batch]:
        """Endless, in a new order each round; reviews of like length share a batch, so little of it is padding."""
        rng = random.Random(seed)
        while True:
            order = rng.sample(reviews, len(reviews))
            groups = []
            for start in range(0, len(order), 16 * size):
                window = sorted(order[start : start + 16 * size], key=lambda review: len(review.text))
                groups += [window[i : i + size] for i in range(0, len(window), size)]
            rng.shuffle(groups)
            yield from map(self.batch, groups)

    def answer_logits(self, model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        """[row, answer token, vocabulary], each from the position before that token.

        The output layer is a fifth of this model's work: it is applied to these few positions only. That is what
        `logits_to_keep` of the model does as well, but from a slice that makes the CPU copy the layer per row.
        """
        hidden = model.base_model(**batch, use_cache=False).last_hidden_state
        before_answers = hidden[:, -self.answer_length - 1 : -1].contiguous()
        return model.get_output_embeddings()(before_answers.flatten(0, 1)).unflatten(0, before_answers.shape[:2])

    def loss(self, model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        logits = self.answer_logits(model, batch).float()
        return token_loss(logits, batch["input_ids"][:, -self.answer_length :])

    def score(self, model: PreTrainedModel, reviews: Sequence[Review], size: int = 32) -> Score:
        """Accuracy asks which of the two answers the model finds likelier, by their first token, where they part."""
        import torch

        model.eval()
        positive, negative = self.answers[True][0], self.answers[False][0]
        loss, right = 0.0, 0
        ordered = sorted(reviews, key=lambda review: len(review.text))
        for start in range(0, len(ordered), size):
            rows = ordered[start : start + size]
            batch = self.batch(rows)
            with torch.inference_mode():
                logits = self.answer_logits(model, batch).float()
            loss += token_loss(logits, batch["input_ids"][:, -self.answer_length :]).item() * len(rows)
            says_positive = logits[:, 0, positive] > logits[:, 0, negative]
            right += sum(said == review.positive for said, review in zip(says_positive.tolist(), rows))
        return Score(loss / len(reviews), right / len(reviews))

    def reply(self, model: torch.nn.Module, review: Review, length: int = 12) -> str:
        """What the model itself writes after the prompt, by its likeliest tokens."""
        import torch

        prompt = self.prompt(review)
        with torch.inference_mode():
            written = model.generate(**self.pad([prompt]), max_new_tokens=length, do_sample=False)
        text = self.tokenizer.decode(written[0, len(prompt) :], skip_special_tokens=True)
        return " ".join(text.split())  # one line, however the model breaks it


def prompt_text(review: Review) -> str:
    return PROMPT.format(review.text)


def token_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
