"""Samples as the model reads them, with what is learnt marked: for the terminal, and as segments for the web page."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from peft_run.data.render import IGNORE, Item

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GREEN, PLAIN = "\033[1;32m", "\033[0m"

Segment = tuple[str, bool]  # text, whether it is learnt


def preview(item: Any, tokenizer: PreTrainedTokenizerBase, *, colour: bool) -> str:
    """One item of a task as text: what is learnt is green, or between ⟦ ⟧ where there are no colours."""
    start, end = (GREEN, PLAIN) if colour else ("⟦", "⟧")
    return "".join(f"{start}{text}{end}" if learnt else text for text, learnt in segments(item, tokenizer))


def segments(item: Any, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """One item of a task in pieces, each wholly learnt or not at all."""
    if isinstance(item, Item):
        return marked(item.ids, [label != IGNORE for label in item.labels], tokenizer)
    if hasattr(item, "answers"):  # of preferences
        parts = [segments(answer, tokenizer) for answer in item.answers]
        return [piece for i, part in enumerate(parts) for piece in ([("\n", False)] if i else []) + part]
    if hasattr(item, "target"):
        target = marked(item.target, [True] * len(item.target), tokenizer)
        return [(f"{tokenizer.decode(item.ids)}\n", False), *target]
    if hasattr(item, "end"):  # a window of a text with an answer
        learnt = [item.end > 0 and item.start <= i <= item.end for i in range(item.length)]
        return marked(item.ids, learnt, tokenizer)
    if hasattr(item, "labels"):  # tags
        return marked(item.ids, [label != IGNORE for label in item.labels], tokenizer)
    return [(f"{tokenizer.decode(item.ids)}  ->  {item.label}", False)]


def marked(ids: Any, learnt: list[bool], tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    return [
        (tokenizer.decode([token for token, _ in group], clean_up_tokenization_spaces=False), is_learnt)
        for is_learnt, group in groupby(zip(ids, learnt), key=lambda pair: pair[1])
    ]
