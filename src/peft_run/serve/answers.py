"""What clients get: answers and pieces of answers in OpenAI's shapes."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from peft_run.serve.engine import Piece
from peft_run.serve.sampling import Chosen

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Choice:
    """One answer, as far as it has come."""

    text: str = ""
    tokens: list[Chosen] = field(default_factory=list)
    finish: str | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        self.finish = piece.finish


class Shape:
    """What chat and plain completions have in common. Each has its own body of a choice."""

    kind: str
    prefix: str

    def __init__(self, model: str, tokenizer: PreTrainedTokenizerBase, logprobs: bool, prompt_tokens: int) -> None:
        self.model, self.tokenizer, self.logprobs = model, tokenizer, logprobs
        self.prompt_tokens = prompt_tokens
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, choices: list[Choice]) -> dict[str, Any]:
        bodies = [
            {"index": i, **self.body(c.text), "logprobs": self.figures(c.tokens), "finish_reason": c.finish}
            for i, c in enumerate(choices)
        ]
        return {**self.head, "object": self.kind, "choices": bodies, "usage": self.usage(choices)}

    def part(self, index: int, piece: Piece, first: bool) -> dict[str, Any]:
        body = {"index": index, **self.delta(piece.text, first), "logprobs": self.figures(piece.tokens)}
        return {**self.head, "object": self.part_kind, "choices": [{**body, "finish_reason": piece.finish}]}

    def last(self, choices: list[Choice]) -> dict[str, Any]:
        """The part with the figures, for those who asked for it."""
        return {**self.head, "object": self.part_kind, "choices": [], "usage": self.usage(choices)}

    def usage(self, choices: list[Choice]) -> dict[str, int]:
        made = sum(len(c.tokens) for c in choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.prompt_tokens + made,
        }

    def word(self, token: int) -> str:
        return self.tokenizer.decode([token])

    part_kind: str

    def body(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def delta(self, text: str, first: bool) -> dict[str, Any]:
        raise NotImplementedError

    def figures(self, tokens: list[Chosen]) -> dict[str, Any] | None:
        raise NotImplementedError


class Chat(Shape):
    kind, part_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def body(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str, first: bool) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": text} if first else {"content": text}}

    def figures(self, tokens: list[Chosen]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        rows = [
            {**self.row(c.token, c.logprob), "top_logprobs": [self.row(token, value) for token, value in c.top]}
            for c in tokens
        ]
        return {"content": rows, "refusal": None}

    def row(self, token: int, logprob: float | None) -> dict[str, Any]:
        word = self.word(token)
        return {"token": word, "logprob": logprob, "bytes": list(word.encode())}


class Completion(Shape):
    kind = part_kind = "text_completion"
    prefix = "cmpl"

    def body(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def delta(self, text: str, first: bool) -> dict[str, Any]:
        return {"text": text}

    def figures(self, tokens: list[Chosen]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        words = [self.word(c.token) for c in tokens]
        return {
            "tokens": words,
            "token_logprobs": [c.logprob for c in tokens],
            "top_logprobs": [{self.word(token): value for token, value in c.top} for c in tokens],
            "text_offset": list(accumulate(map(len, words[:-1]), initial=0))[: len(words)],
        }
