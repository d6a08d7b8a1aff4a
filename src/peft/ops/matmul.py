"""float32 products on the CPU, by oneDNN where torch's own choice is slow.

torch multiplies float32 with MKL, which leaves half of an AMD processor's 512-bit units idle: oneDNN takes 0.43 of its
time on them, with the weight as it lies in memory. Its sums are rounded in another order, so it serves where a gradient
goes through a frozen layer: without one, outputs stay the base model's, bit for bit, unless `use_onednn` is called.
"""

import functools
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

LEAST = 1 << 22  # multiplications from which a product is worth another kernel
LARGE = 1 << 16  # numbers in a weight from which its layer is worth another class
KERNELS = "64"  # that oneDNN and torch keep: one for each shape, of half a megabyte or more; their default is 1024


@functools.cache
def onednn_is_faster():
    """Whether this processor's float32 products are better done by oneDNN. PEFT_ONEDNN=0 or 1 decides in its place."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    told, about = os.environ.get("PEFT_ONEDNN"), Path("/proc/cpuinfo")
    if told in ("0", "1"):
        faster = told == "1"
    else:
        faster = torch.backends.cpu.get_cpu_capability() == "AVX512" and about.exists()
        faster = faster and "AuthenticAMD" in about.read_text()
    if faster:  # read at the first product; without a bound, batches of ever other lengths would fill the memory
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", KERNELS)
        os.environ.setdefault("LRU_CACHE_CAPACITY", KERNELS)
    return faster


def gains(x, W):
    """Whether x Wᵀ should be oneDNN's; x (..., in), W (out, in)."""
    return (
        x.dtype is torch.float32
        and W.dtype is torch.float32
        and x.is_cpu
        and x.numel() * len(W) >= LEAST
        and onednn_is_faster()
    )


def linear(x, W, bias=None):
    """x (..., in) -> x Wᵀ + bias (..., out). oneDNN's has no gradient, so a graph gets torch's."""
    if torch.is_grad_enabled() or not gains(x, W):
        return F.linear(x, W, bias)
    return multiplied(x.contiguous(), W, bias)


def multiplied(x, W, bias):
    """x Wᵀ + bias by oneDNN; W may be a transposed view."""
    return torch.ops.mkldnn._linear_pointwise(x, W, bias, "none", [], "")


def of(base):
    """The product of a base layer where no gradient is wanted."""
    return linear if type(base) is OneDnnLinear and base.always else F.linear


def matmul(a, b):
    """a (rows, k), b (k, columns) -> a b, as `linear`."""
    return a @ b if torch.is_grad_enabled() or not gains(a, b.t()) else linear(a, b.t())


def times(a, b):
    """a (rows, k), b (k, columns) -> a b, with gradients for both; torch's where none is wanted."""
    learns = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    if not learns or torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return a @ b
    return a @ b if torch.is_autocast_enabled(a.device.type) or not gains(a, b.t()) else Times.apply(a, b)


class Times(torch.autograd.Function):
    """See `times`."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return matmul(a, b)

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        da = matmul(g, b.t()) if ctx.needs_input_grad[0] else None
        db = matmul(a.t(), g) if ctx.needs_input_grad[1] else None
        return da, db


class OneDnnLinear(nn.Linear):
    """An nn.Linear whose weight, while it is frozen, oneDNN multiplies: in training, or if `always` everywhere."""

    always = False

    def forward(self, x):
        from peft.ops import product

        wanted = self.always or (torch.is_grad_enabled() and x.requires_grad)
        if not wanted or not product.transparent(self, x):
            return super().forward(x)
        return product.linear(x, self.weight, self.bias)

    def _get_name(self):
        return nn.Linear.__name__


def attach(model):
    """Let oneDNN multiply in training in all large layers of a model, adapted or not, where that is faster."""
    for module in _large_layers(model, nn.Linear):
        module.__class__ = OneDnnLinear


def detach(model):
    """Undo `attach`."""
    for module in _large_layers(model, OneDnnLinear):
        if not module.always:
            module.__class__ = nn.Linear


def use_onednn(model):
    """Let oneDNN multiply without a gradient too, in all large float32 nn.Linear layers of a model; returns how many.

    That makes long prompts and evaluation faster on processors on which torch's own products are slow; on others
    nothing changes, and 0 is returned. Weights stay as and where they are; outputs differ by the rounding of a sum.
    """
    attach(model)
    found = _large_layers(model, OneDnnLinear)
    for module in found:
        module.always = True
    return len(found)


def _large_layers(model, cls):
    if not onednn_is_faster():
        return []
    layers = (m for m in model.modules() if type(m) is cls)
    return [m for m in layers if (W := m._parameters.get("weight")) is not None and W.numel() >= LARGE]
