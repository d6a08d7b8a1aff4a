"""Cases over all methods: a training step and its peak memory, on a model of SmolLM2-135M's width with 4 layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fixtures
import methods
import torch
from cases_compute import Parts, resident_peak
from timing import seconds

SHAPE = {**fixtures.SHAPE, "num_hidden_layers": 4, "vocab_size": 4096}
LENGTH = 256


def base_model():
    """A frozen model; the same weights at every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).requires_grad_(False)


def adapted_model(method: str):
    """The model with an adapter, in training mode, every trained tensor moved from its start."""
    import peft

    torch.manual_seed(1)
    model = peft.get_peft_model(base_model(), methods.config(method)).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.01)
    return model


def timer(model, call: dict) -> Callable[[], float]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, SHAPE["vocab_size"], (1, LENGTH), generator=generator)

    def measure() -> float:
        model.zero_grad(set_to_none=True)
        return seconds(lambda: model(input_ids=ids, labels=ids, **call).loss.backward())

    return measure


def method_step(scratch: str, method: str) -> Parts:
    """Forward and backward of 1 x 256 tokens, no optimizer."""
    return {
        "floor": timer(fixtures.want_embedding_gradient(base_model()).train(), {}),
        "adapted": timer(adapted_model(method), methods.call(method)),
    }


def method_memory(scratch: str, method: str) -> Parts:
    """Peak resident bytes of the second step; to be asked of a process of its own."""

    def peak(model, call: dict) -> float:
        measure_step = timer(model, call)
        measure_step()
        Path("/proc/self/clear_refs").write_text("5")
        measure_step()
        return resident_peak()

    return {
        "floor": lambda: peak(fixtures.want_embedding_gradient(base_model()).train(), {}),
        "adapted": lambda: peak(adapted_model(method), methods.call(method)),
    }


CASES = {"method_step": method_step, "method_memory": method_memory}
