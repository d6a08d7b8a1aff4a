"""Which layers of a model oneDNN multiplies in: the large float32 ones on the CPU, adapted or not. See `matmul.py`."""

import torch
from torch import nn

from peft.ops import matmul
from peft.ops.product import OneDnnLinear

LARGE = 1 << 16  # numbers in a weight from which its layer is worth another class


def attach(model):
    """Let oneDNN multiply in training in all large layers of a model, adapted or not, where that is faster."""
    if matmul.onednn_is_faster():
        for module in model.modules():
            if type(module) is nn.Linear and _is_large(module):
                module.__class__ = OneDnnLinear


def detach(model):
    """Undo `attach`, whatever the model has become since."""
    for module in _attached(model):
        if not module.always:
            module.__class__ = nn.Linear


def use_onednn(model):
    """Let oneDNN multiply without a gradient too, in all large float32 nn.Linear layers of a model; returns how many.

    That makes long prompts and evaluation faster on processors on which torch's own products are slow; on others
    nothing changes, and 0 is returned. Weights stay as and where they are; outputs differ by the rounding of a sum.
    """
    attach(model)
    found = _attached(model)
    for module in found:
        module.always = True
    return len(found)


def _attached(model):
    return [module for module in model.modules() if type(module) is OneDnnLinear]


def _is_large(linear):
    W = linear._parameters.get("weight")
    return W is not None and W.numel() >= LARGE and W.dtype is torch.float32 and W.is_cpu
