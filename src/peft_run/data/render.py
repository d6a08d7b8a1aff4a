"""Chats as tokens, with the exact tokens that are learnt. The one renderer of training, evaluation, chat and serving.

Training renders the whole chat at once and finds the answers in it by their place in the text, so that the tokens are
those that the model meets when it is used: what stands before an answer is what `prompt` gives.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from peft_run.config import Recipe
from peft_run.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100  # the label of tokens that are not learnt

# For tokenizers without a template: one line per message, and the end token after an answer.
PLAIN = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'assistant' -%}{{ message.content }}{{ eos_token }}{%- else -%}{{ message.content }}"
    "{{ '\\n' }}{%- endif -%}"
    "{%- endfor -%}"
)

Message = dict[str, Any]


class Item(NamedTuple):
    """One row of tokens; labels[i] is the token i itself where it is learnt, else IGNORE."""

    ids: array
    labels: array

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def learnt(self) -> int:
        return len(self.labels) - self.labels.count(IGNORE)


class Renderer:
    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.specials = set(tokenizer.all_special_ids)

    @classmethod
    def of(cls, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Renderer:
        """With the template that the recipe asks for. It belongs to the tokenizer from now on, and is saved with it."""
        asked = recipe.data.template
        if asked in ("auto", "tokenizer"):
            if tokenizer.chat_template is None and asked == "tokenizer":
                raise UsageError("template.none")
            tokenizer.chat_template = tokenizer.chat_template or plain_template(tokenizer)
        elif asked == "plain":
            tokenizer.chat_template = plain_template(tokenizer)
        else:
            file = recipe.at(asked)
            if not file.is_file():
                raise UsageError("template.no_file", path=asked)
            tokenizer.chat_template = file.read_text(encoding="utf-8")
        return cls(tokenizer)

    # -- what the model reads -----------------------------------------------------------------------------------------

    def text(self, messages: Sequence[Message], *, generate: bool = False) -> str:
        """The chat as the template writes it; with `generate`, up to where the answer begins."""
        plain = [{"role": m["role"], "content": m["content"]} for m in messages]
        try:
            return self.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=generate)
        except Exception as error:  # jinja raises whatever the template makes it raise
            raise UsageError("template.failed", problem=f"{type(error).__name__}: {error}") from error

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens that an answer is generated from."""
        return self.tokenizer(self.text(messages, generate=True), add_special_tokens=False)["input_ids"]

    # -- what it learns -----------------------------------------------------------------------------------------------

    def items(self, messages: Sequence[Message], train_on: str = "completions") -> list[Item]:
        """The chat as training rows: one; or one per answer, where the template rewrites earlier turns."""
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("train", True)]
        if train_on == "last":
            turns = turns[-1:]
        full = self.text(messages)
        if train_on == "all":
            return [self.item(full, [(0, len(full))])]
        spans = [self.span(messages, turn, full) for turn in turns]
        if all(spans):
            return [self.item(full, spans)]
        items = []
        for turn in turns:
            part = messages[: turn + 1]
            text = self.text(part)
            span = self.span(part, turn, text)
            if span is None:
                raise UsageError("template.no_prefix")
            items.append(self.item(text, [span]))
        return items

    def span(self, messages: Sequence[Message], turn: int, full: str) -> tuple[int, int] | None:
        """Where the answer of this turn stands in the full text; None where the template gives it no one place."""
        before, after = self.text(messages[:turn], generate=True), self.text(messages[: turn + 1])
        if not (full.startswith(before) and full.startswith(after) and len(after) > len(before)):
            return None
        return len(before), len(after)

    def item(self, text: str, spans: Sequence[tuple[int, int]]) -> Item:
        coded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, places = coded["input_ids"], coded["offset_mapping"]
        labels = [IGNORE] * len(ids)
        for start, end in spans:
            inside = [i for i, (first, last) in enumerate(places) if start <= first and last <= end and first < last]
            crossing = [i for i, (first, last) in enumerate(places) if first < start < last]
            if crossing:  # a token of prompt and answer in one, which generation could never begin with
                return self.pieces(text, spans)
            # What follows the stop token, such as a line end, is the template's: generation stops before it.
            stops = [i for i in inside if ids[i] in self.specials]
            for i in inside:
                if not stops or i <= stops[-1]:
                    labels[i] = ids[i]
        return until_last_learnt(ids, labels)

    def pieces(self, text: str, spans: Sequence[tuple[int, int]]) -> Item:
        """As `item`, with a token boundary forced at both ends of every answer."""
        ids, labels, done = array("i"), array("i"), 0
        for start, end in [*spans, (len(text), len(text))]:
            for piece, learnt in ((text[done:start], False), (text[start:end], True)):
                part = self.tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
                stops = [i for i, token in enumerate(part) if token in self.specials]
                last = stops[-1] if stops else len(part)
                ids.extend(part)
                labels.extend(t if learnt and i <= last else IGNORE for i, t in enumerate(part))
            done = end
        return until_last_learnt(ids, labels)

    def document(self, text: str) -> Item:
        """Plain text, all of it learnt, closed by the end token."""
        ids = self.tokenizer(text)["input_ids"]
        if self.tokenizer.eos_token_id is not None and (not ids or ids[-1] != self.tokenizer.eos_token_id):
            ids = [*ids, self.tokenizer.eos_token_id]
        return Item(array("i", ids), array("i", ids))

    # -- what belongs to the artefact ---------------------------------------------------------------------------------

    def stop_ids(self) -> list[int]:
        """The tokens that end an answer: the one that the template closes an answer with, and the tokenizer's own."""
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        found = [label for item in self.items(probe) for label in item.labels if label in self.specials][-1:]
        own = self.tokenizer.eos_token_id
        return list(dict.fromkeys([*found, *([own] if own is not None else [])]))

    def template_sha256(self) -> str:
        return hashlib.sha256((self.tokenizer.chat_template or "").encode()).hexdigest()

    def tokenizer_sha256(self) -> str:
        """Of what the tokenizer does: vocabulary, merges, normalisation; not of how a file of it is laid out."""
        return hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def until_last_learnt(ids: Sequence[int], labels: Sequence[int]) -> Item:
    """What comes after the last learnt token changes no loss, and would only cost time."""
    end = next((i + 1 for i in reversed(range(len(labels))) if labels[i] != IGNORE), len(labels))
    return Item(array("i", ids[:end]), array("i", labels[:end]))


def plain_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """PLAIN, begun as this tokenizer begins a text."""
    first = tokenizer("a")["input_ids"][0]
    begins = tokenizer.bos_token_id is not None and first == tokenizer.bos_token_id
    return ("{{- bos_token -}}" if begins else "") + PLAIN


def template_file(folder: Path) -> Path:
    return folder / "chat_template.jinja"
