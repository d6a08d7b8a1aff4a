"""Samples as the model reads them, with what is learnt in colour; between ⟦ ⟧ where there are no colours."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from peft_run.data.render import IGNORE, Item

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GREEN, PLAIN = "\033[1;32m", "\033[0m"


def preview(item: Any, tokenizer: PreTrainedTokenizerBase, *, colour: bool) -> str:
    """One item of a task as text."""
    if isinstance(item, Item):
        return marked(item.ids, [label != IGNORE for label in item.labels], tokenizer, colour)
    if hasattr(item, "answers"):  # of preferences
        return "\n".join(preview(answer, tokenizer, colour=colour) for answer in item.answers)
    if hasattr(item, "target"):
        target = marked(item.target, [True] * len(item.target), tokenizer, colour)
        return f"{tokenizer.decode(item.ids)}\n{target}"
    if hasattr(item, "end"):  # a window of a text with an answer
        learnt = [item.end > 0 and item.start <= i <= item.end for i in range(item.length)]
        return marked(item.ids, learnt, tokenizer, colour)
    if hasattr(item, "labels"):  # tags
        return marked(item.ids, [label != IGNORE for label in item.labels], tokenizer, colour)
    return f"{tokenizer.decode(item.ids)}  ->  {item.label}"


def marked(ids: Any, learnt: list[bool], tokenizer: PreTrainedTokenizerBase, colour: bool) -> str:
    start, end = (GREEN, PLAIN) if colour else ("⟦", "⟧")
    parts = []
    for is_learnt, group in groupby(zip(ids, learnt), key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in group], clean_up_tokenization_spaces=False)
        parts.append(f"{start}{text}{end}" if is_learnt else text)
    return "".join(parts)
