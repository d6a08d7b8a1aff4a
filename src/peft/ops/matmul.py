"""float32 products on the CPU, by oneDNN where torch's own choice is slow.

torch multiplies float32 with MKL, which leaves half of an AMD processor's 512-bit units idle: oneDNN takes 0.43 of its
time on them, with the weight as it lies in memory. Its sums are rounded in another order, so it serves where a gradient
goes through a frozen layer: without one, outputs stay the base model's, bit for bit, unless `onednn.use_onednn` is
called.
"""

import functools
import os
from pathlib import Path

import torch
import torch.nn.functional as F

LEAST = 1 << 22  # multiplications from which a product is worth another kernel
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


def matmul(a, b):
    """a (rows, k), b (k, columns) -> a b, as `linear`."""
    return linear(a, b.t())


def is_plain(x):
    """Whether a call with x is torch's alone, so that an operation of ours may take its place: not traced, not batched
    by functorch, not cast by autocast."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_autocast_enabled(x.device.type)
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def times(a, b):
    """a (rows, k), b (k, columns) -> a b, with gradients for both; torch's where none is wanted."""
    learns = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    return Times.apply(a, b) if learns and is_plain(a) and gains(a, b.t()) else a @ b


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
