"""What was lost: the perplexity of base and tuned on general text that has nothing to do with the task.

A model that has forgotten is surprised by what it could foresee before. The packaged texts were written for this.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peft_run.errors import UsageError
from peft_run.metrics.resample import middle, redrawn
from peft_run.metrics.table import perplexity

if TYPE_CHECKING:
    from torch import nn

    from peft_run.artefact import Tuned
    from peft_run.config import Recipe
    from peft_run.evaluate.sides import Sides

PACKAGED = Path(__file__).parent / "general"
NONE = "none"


def texts_of(recipe: Recipe) -> dict[str, list[str]]:
    """name -> paragraphs. The recipe's text, or the packaged ones."""
    asked = recipe.eval.forgetting
    if asked == NONE:
        return {}
    if asked != "auto":
        from peft_run.data.read import decode, read_txt

        file = recipe.at(asked)
        if not file.is_file():
            raise UsageError("evaluate.no_text", path=asked)
        rows = read_txt(file, decode(file))
        if not rows:
            raise UsageError("evaluate.empty_text", path=asked)
        return {file.stem: [row["text"] for row in rows]}
    return {file.stem: paragraphs(file) for file in sorted(PACKAGED.glob("*.txt"))}


def paragraphs(file: Path) -> list[str]:
    return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def forgetting(tuned: Tuned, sides: Sides, texts: dict[str, list[str]]) -> dict[str, Any]:
    """name -> perplexity of each side, and how many times as high it has become, with its interval."""
    found = {}
    for name, parts in texts.items():
        stats: dict[str, np.ndarray] = {}
        for side in sides.names:
            with sides.on(side) as model:
                stats[side] = np.array([surprise(model, tuned, part) for part in parts])
        found[name] = {side: float(perplexity(stats[side].sum(0))) for side in sides.names}
        if "base" in sides.names:
            found[name] |= growth(stats["base"], stats["tuned"])
    return found


def surprise(model: nn.Module, tuned: Tuned, text: str) -> tuple[float, float]:
    """(loss over the text's tokens, their number), by the model's own forward.

    The text begins as texts of this tokenizer do: many models can say nothing without the start token.
    """
    import torch

    ids, start = tuned.tokenizer(text)["input_ids"], tuned.tokenizer.bos_token_id
    if start is not None and ids[:1] != [start]:
        ids = [start, *ids]
    ids = ids[: tuned.task.max_length]
    row = torch.tensor([ids], device=tuned.device)
    with torch.no_grad():
        logits = model(input_ids=row).logits[0, -len(ids) : -1].float()  # some methods put tokens in front
    loss = torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum")
    return loss.item(), float(len(ids) - 1)


def growth(base: np.ndarray, tuned: np.ndarray) -> dict[str, Any]:
    ratio = float(perplexity(tuned.sum(0)) / perplexity(base.sum(0)))
    if len(base) < 2:
        return {"ratio": ratio, "ratio_interval": None}
    drawn = [perplexity(weights @ tuned) / perplexity(weights @ base) for weights in redrawn(len(base), 0)]
    return {"ratio": ratio, "ratio_interval": middle(np.concatenate(drawn))}
