"""Lily: W + s·(Σ_e p_e B_e)ᵀA, whose p depends on the input; layers share A and B."""

import torch
from case import Case
from example import BASES, Example
from models import WIDTH, noise
from torch import nn


class Stack(nn.Module):
    """Four layers of one shape, and one of another."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"lin": nn.Linear(WIDTH, WIDTH)}) for _ in range(4))
        self.lin = nn.Linear(WIDTH, 5, bias=False)

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block["lin"](x))
        return self.lin(x)


BASES["stack"] = Stack, noise((6, WIDTH), 7)
BASES["stack_sequence"] = Stack, noise((3, 5, WIDTH), 7)


def example(name, base, target, **config):
    """An example; no weight of its own does what it does."""
    about = {"identity": None} if config.get("init_weights") is False else {}
    return Example(name, base, {"r": 3, "target_modules": target, **config}, "LILY", merges=False, rows=False, **about)


EXAMPLES = [
    example("lily", "stack", ["lin"]),
    example("lily_stride", "stack_sequence", ["lin"], stride_A=3, num_B=3, scaling=0.5),
    example("lily_all_alike", "stack", ".*lin", stride_A=4),
    example("lily_apart", "mlp", ["lin0", "lin1"]),
    example("lily_random", "no_bias", ["layer"], init_weights=False),
    example("lily_transposed", "transposed", ["layer"]),
]
QV = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
LILY = {"config_class": "LilyConfig"}
CASES = [
    Case("lily", "llama", QV, second={**QV, "num_B": 3, "stride_A": 2}, **LILY),
    Case("lily_stride", "llama_bias", {**QV, "stride_A": 2, "scaling": 2.0, "init_weights": False}, **LILY),
    Case("lily_regex", "llama", {"r": 2, "stride_A": 3, "target_modules": r".*layers\.\d\..*_proj"}, **LILY),
    # Upstream names fewer than twenty layers in full, and then lets none share.
    Case("lily_all", "llama", {"r": 2, "stride_A": 2, "target_modules": "all-linear"}, names=False, **LILY),
]
