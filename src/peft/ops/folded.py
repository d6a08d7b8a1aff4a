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

ROWS = 16  # more rows of x than this amortise the low-rank products anyway
CALLS = 4  # forwards before folding: a short answer does not pay for it
SHARE = 0.25  # of the memory that is available

enabled = True
_held = 0  # bytes of all folded weights


class Folded:
    """The folded weight of one layer for one tuple of adapters, and what it was made from."""

    def __init__(self, sources):
        self.sources, self.stamp = sources, stamp(sources)
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
    if not enabled or x.numel() > ROWS * x.shape[-1] or x.dtype not in (torch.float32, torch.float64):
        return None
    base = layer._modules["base_layer"]
    if layer.training or not x.is_cpu or not lowrank.transparent(base, x):
        return None
    sources = [base._parameters["weight"]]
    for a in active:
        sources += a.parameters(frozen=True)
        sources.append(layer.__dict__.get("scaling", {}).get(a.name))
    folded = layer.folded
    if folded is None or stamp(sources) != folded.stamp:
        layer.folded = Folded(sources)
        return None
    if folded.weight is None:
        folded.calls += 1
        if folded.calls < CALLS or not _fold(layer, active, folded):
            return None
    return F.linear(x, folded.weight, folded.bias)


def _fold(layer, active, folded):
    global _held
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


def stamp(sources):
    """Changes when one of the tensors, held by the caller, is replaced or written to."""
    return [
        t if not isinstance(t, torch.Tensor) else (t.data_ptr(), 0 if t.is_inference() else t._version) for t in sources
    ]


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
