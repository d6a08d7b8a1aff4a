"""Answers from prompts, many at once, always the same ones for the same prompts and seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from peft_run.config.schema import Generate


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
    settings: Generate,
    seed: int = 0,
) -> list[str]:
    """The answer to each prompt, up to a stop token. One batch: prompts of like length belong together."""
    import torch

    device = next(model.parameters()).device
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    # On the left, so that every answer begins where its prompt ends.
    ids = torch.tensor([[*[pad] * (width - len(row)), *row] for row in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device)
    torch.manual_seed(seed)
    with torch.no_grad():
        out = model.generate(
            input_ids=ids, attention_mask=mask, generation_config=generation_config(stop_ids, pad, settings)
        )
    return texts(out[:, width:], tokenizer, stop_ids)


def write(
    model: nn.Module, inputs: dict[str, torch.Tensor], tokenizer, stop_ids: Sequence[int], settings: Generate, seed: int
) -> list[str]:
    """What an encoder-decoder writes for a batch of inputs."""
    import torch

    torch.manual_seed(seed)
    with torch.no_grad():
        config = generation_config(stop_ids, tokenizer.pad_token_id, settings)
        config.decoder_start_token_id = model.config.decoder_start_token_id
        out = model.generate(**inputs, generation_config=config)
    return texts(out[:, 1:], tokenizer, stop_ids)


def generation_config(stop_ids: Sequence[int], pad: int, settings: Generate):
    """Greedy at temperature 0, else sampling from the whole distribution; nothing of the model's own habits."""
    from transformers import GenerationConfig

    plain = {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "num_beams": 1}
    sampling = (
        {"do_sample": True, "temperature": settings.temperature} if settings.temperature else {"do_sample": False}
    )
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=pad,
        **plain,
        **sampling,
    )


def texts(rows: torch.Tensor, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> list[str]:
    """New tokens as text, without the stop token and what a batch puts after it."""
    answers = []
    for row in rows.tolist():
        end = next((i for i, token in enumerate(row) if token in stop_ids), len(row))
        answers.append(tokenizer.decode(row[:end], skip_special_tokens=True).strip())
    return answers
