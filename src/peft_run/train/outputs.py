"""A causal model's losses at the places that are learnt, by the shortest way that is right for this model.

The short way runs the decoder, picks the hidden states, and applies the output layer to those only. It is taken only
where it gives what the model's own forward gives: some models scale or cap their logits afterwards, and some methods
put tokens in front of the batch. Whether it does is tried on the first batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from peft import PeftError
from peft_run.train import token_loss

if TYPE_CHECKING:
    from torch import nn

TRIED = 64  # tokens that both ways are compared on
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 2e-2}  # of a token's loss; losses are of order 1


class Outputs:
    def __init__(self, model: nn.Module) -> None:
        self.short: bool | None = None if can_be_short(model) else False

    def token_losses(self, model: nn.Module, batch: dict[str, Any], *, count_right: bool = False) -> Any:
        """(learnt tokens,) float32; with count_right, also how many of them are the likeliest token."""
        if self.short is None:
            self.short = agree(model, batch)
        if self.short:
            hidden, head = hidden_at(model, batch)
            losses = token_loss.token_losses(hidden, batch["targets"], head)
            return (losses, token_loss.count_right(hidden, batch["targets"], head)) if count_right else losses
        logits = logits_at(model, batch)
        losses = F.cross_entropy(logits, batch["targets"], reduction="none")
        return (losses, int((logits.argmax(-1) == batch["targets"]).sum())) if count_right else losses


def can_be_short(model: nn.Module) -> bool:
    """Whether the model has a decoder and an output layer, and no method that changes the batch."""
    configs = getattr(model, "peft_config", {}).values()
    if any(config.is_prompt_learning for config in configs):
        return False
    base = base_of(model)
    return hasattr(base, "get_decoder") and base.get_output_embeddings() is not None


def base_of(model: nn.Module) -> nn.Module:
    """The transformers model inside; adapters sit in its layers, so it computes with them."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def inputs_of(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}


def hidden_at(model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, nn.Module]:
    """The hidden states before each learnt token, (tokens, width), and the output layer.

    Padding is on the right, where a causal model never looks back from: no mask is needed, and attention is faster.
    """
    base = base_of(model)
    inputs = inputs_of(batch)
    inputs.pop("attention_mask", None)
    hidden = base.get_decoder()(**inputs, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1)[batch["at"]], base.get_output_embeddings()


def logits_at(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """The model's own logits at the learnt places, (tokens, vocabulary). Methods may have put tokens in front."""
    logits = model(**inputs_of(batch), use_cache=False).logits
    logits = logits[:, -batch["input_ids"].shape[1] :]
    return logits.flatten(0, 1)[batch["at"]].float()


def agree(model: nn.Module, batch: dict[str, Any]) -> bool:
    """Whether both ways give the same losses, without dropout, on some tokens of this batch."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            hidden, head = hidden_at(model, batch)
            few = slice(0, TRIED)
            ours = token_loss.token_losses(hidden[few], batch["targets"][few], head)
            theirs = F.cross_entropy(logits_at(model, batch)[few], batch["targets"][few], reduction="none")
    except PeftError:  # methods that must be called through their PeftModel say so
        return False
    finally:
        model.train(training)
    tolerance = TOLERANCE.get(hidden.dtype, 1e-3)
    return bool(torch.allclose(ours, theirs, atol=tolerance, rtol=tolerance))
