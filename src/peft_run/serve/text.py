"""Tokens to text as they come: no half characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BROKEN = "\ufffd"  # what a decoder writes for bytes that are no character (yet)
LONGEST_CHARACTER = 8  # tokens; after so many, broken bytes are what the model meant


class Text:
    """`add(token)` returns the text that is certain now; `stopped` is set when a stop string has come."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stops = [stop for stop in stops if stop]
        self.tokens: list[int] = []
        self.before = self.done = 0  # tokens[before:done] are decoded again with each new one: spaces depend on them
        self.held = ""  # decoded, but it may be the beginning of a stop string
        self.stopped = False

    def add(self, token: int) -> str:
        self.tokens.append(token)
        whole = self._decode(self.tokens[self.before :])
        if whole.endswith(BROKEN) and len(self.tokens) - self.done < LONGEST_CHARACTER:
            return ""
        new = whole[len(self._decode(self.tokens[self.before : self.done])) :]
        self.before, self.done = self.done, len(self.tokens)
        return self._release(new)

    def finish(self) -> str:
        """The rest, when no more tokens come."""
        if self.stopped:
            return ""
        whole = self._decode(self.tokens[self.before :])
        new = whole[len(self._decode(self.tokens[self.before : self.done])) :]
        self.before = self.done = len(self.tokens)
        text = self._release(new) + ("" if self.stopped else self.held)
        self.held = ""
        return text

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _release(self, new: str) -> str:
        text = self.held + new
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        keep = max((beginning_at_end(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


def beginning_at_end(text: str, stop: str) -> int:
    """How many of the last characters of `text` may be the first ones of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
