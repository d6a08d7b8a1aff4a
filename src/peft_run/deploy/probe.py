"""What two copies of a model are compared on: a few texts, their logits, and what follows them greedily."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from peft_run.config.schema import GENERATIVE

if TYPE_CHECKING:
    import torch
    from torch import nn

    from peft_run.artefact import Tuned

TEXTS = [
    "The library opens at nine in the morning.",
    "房间很干净，服务员也很热情，下次还会再来。",
    "1, 2, 3, 5, 8, 13, 21,",
    "Write one sentence about the sea. 请写一句关于大海的话。",
]
NEW_TOKENS = 16
TOLERANCE = 1e-3  # in logits, which are of the order of 10; float32 rounding through 30 layers stays well below


def prompts(tuned: Tuned) -> list[list[int]]:
    """The texts as the model reads them in use: as questions of a chat where it chats."""
    if tuned.recipe.task in GENERATIVE:
        return [tuned.renderer.prompt([{"role": "user", "content": text}]) for text in TEXTS]
    return [tuned.tokenizer(text)["input_ids"] for text in TEXTS]


def logits(model: nn.Module, rows: Sequence[list[int]]) -> list[torch.Tensor]:
    """(tokens, vocabulary) or (labels,) in float32 for each row, on the CPU."""
    import torch

    device = next(model.parameters()).device
    found = []
    with torch.no_grad():
        for row in rows:
            batch = {"input_ids": torch.tensor([row], device=device)}
            if model.config.is_encoder_decoder:
                start = model.config.decoder_start_token_id
                batch["decoder_input_ids"] = torch.tensor([[start, *row[:8]]], device=device)
            out = model(**batch)
            tensor = out.start_logits + out.end_logits if hasattr(out, "start_logits") else out.logits
            found.append(tensor[0].float().cpu())
    return found


def largest_difference(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def greedy(model: nn.Module, rows: Sequence[list[int]], stop_ids: Sequence[int]) -> list[list[int]]:
    """The next tokens of each row, the likeliest each time."""
    import torch

    from peft_run.config.schema import Generate
    from peft_run.generation import generation_config

    settings = Generate(max_new_tokens=NEW_TOKENS, temperature=0)
    config = generation_config(stop_ids, model.config.pad_token_id or 0, settings)
    config.decoder_start_token_id = getattr(model.config, "decoder_start_token_id", None)
    device = next(model.parameters()).device
    found = []
    for row in rows:
        ids = torch.tensor([row], device=device)
        with torch.no_grad():
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        found.append(out[0, 0 if model.config.is_encoder_decoder else len(row) :].tolist())
    return found


def same_words(ours: Sequence[list[int]], theirs: Sequence[list[int]]) -> tuple[int, int]:
    """(tokens in which two sets of continuations agree, from the start of each; all tokens)."""
    agreed = total = 0
    for a, b in zip(ours, theirs, strict=True):
        total += max(len(a), len(b))
        for x, y in zip(a, b):
            if x != y:
                break
            agreed += 1
    return agreed, total
