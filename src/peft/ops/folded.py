"""Decoding at the base model's speed: after a few single-token forwards, a layer keeps W' = W + its adapters' effect.

One token through a small layer is bound by the number of operations, and each further one costs a tenth of the layer.
So a linear layer that is asked again and again for few rows, without gradients, under the same adapters, folds them
into a second weight and uses that. Only for float32 and float64 on the CPU: in half precision, folding would round
small updates away. It is dropped as soon as anything it was made from changes, and never takes more than a quarter of
the memory that is free.
"""

import os

import torch
import torch.nn.functional as F

from peft.ops import lowrank
from peft.ops.product import transparent
from peft.ops.sources import Sources

CALLS = 4  # forwards before folding: a short answer does not pay for it
SHARE = 0.25  # of the memory that is available

enabled = True
_held = 0  # bytes of all folded weights


class Folded:
    """The folded weight of one layer for one tuple of adapters, and what it was made from."""

    def __init__(self, layer, active):
        W = layer._modules["base_layer"]._parameters
        scaling = layer.__dict__.get("scaling", {})
        places = [(W, key, t, W, key, t) for key, t in W.items() if t is not None]
        places += [p for a in active for p in a.places()]
        self.active = active
        self.sources = Sources(places, [(scaling, a.name) for a in active])
        self.calls = 0
        self.weight = self.bias = None

    def __del__(self):
        global _held
        if self.weight is not None:
            _held -= self.weight.nbytes

    def __deepcopy__(self, memo):
        return None

    def __reduce__(self):
        return (type(None), ())


def output(layer, active, x):
    """The layer's output for x (..., in) through its folded weight, or None where it has none (yet)."""
    if not enabled or x.numel() > lowrank.FEW * x.shape[-1] or x.dtype not in (torch.float32, torch.float64):
        return None
    if layer.training or not x.is_cpu or not transparent(layer._modules["base_layer"], x):
        return None
    folded = layer.folded
    if folded is None or folded.active is not active or not folded.sources.unchanged():
        layer.folded = Folded(layer, active)
        return None
    if folded.weight is None:
        folded.calls += 1
        if folded.calls < CALLS or not _fold(layer, active, folded):
            return None
    return F.linear(x, folded.weight, folded.bias)


def _fold(layer, active, folded):
    global _held
    if not all(a.folds for a in active):
        folded.calls = -1_000_000
        return False
    W = layer.base_weight()
    if _held + W.nbytes > SHARE * (available_memory() + _held):
        folded.calls = -1_000  # ask again much later
        return False
    try:
        weight = layer.adapted_weight(active, W).to(W.dtype)
        bias = layer.bias
        for a in active:
            bias = a.merged_bias(bias, W)
    except NotImplementedError:  # a method whose effect is no fixed weight
        folded.calls = -1_000_000
        return False
    folded.weight, folded.bias = weight, bias
    _held += weight.nbytes
    return True


def available_memory():
    """Bytes that can be allocated without swapping."""
    try:
        with open("/proc/meminfo") as f:
            for line in f:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4 if hasattr(os, "sysconf") else 1 << 30
