"""Gradients for kernels: the float weight that the stored one stands for carries them to x, whatever the kernel does.

Some kernels have no gradient, so that everything in front of them would silently be trained on a part of its own; some
fail in the backward pass; others keep the float weight of every layer until then. This makes it anew, for one product.
"""

import torch

from peft.ops import matmul
from peft.quant.backend import Plain


class Carry:
    """A forward hook that puts our gradient in place of the kernel's."""

    def __init__(self, backend):
        self.backend = backend

    def __call__(self, base, args, y):
        x, bias = args[0], getattr(base, "bias", None)
        bias = bias if bias is not None and bias.requires_grad else None
        if not torch.is_grad_enabled() or not (x.requires_grad or bias is not None):
            return None
        return StraightThrough.apply(x, y.detach(), bias, base, self.backend)


class Carried(Plain):
    """A storage whose layers get our gradient while their model has adapters."""

    def attach(self, base):
        if not any(isinstance(hook, Carry) for hook in base._forward_hooks.values()):
            base.register_forward_hook(Carry(self))

    def detach(self, base):
        for key in [k for k, hook in base._forward_hooks.items() if isinstance(hook, Carry)]:
            del base._forward_hooks[key]


class StraightThrough(torch.autograd.Function):
    """x (..., in), y (..., out) that a kernel made of it, a trained bias b or None -> y, with gradients of x Wᵀ + b."""

    @staticmethod
    def forward(ctx, x, y, bias, base, backend):
        ctx.base, ctx.backend, ctx.dtypes = base, backend, (x.dtype, None if bias is None else bias.dtype)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, g):
        base, backend, (x_dtype, bias_dtype) = ctx.base, ctx.backend, ctx.dtypes
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            W = backend.unpack(base, backend.get(base, "weight")).to(g.dtype)
            dx = matmul.matmul(g.flatten(0, -2), W).view(*g.shape[:-1], -1).to(x_dtype)
        if ctx.needs_input_grad[2]:
            dbias = g.flatten(0, -2).sum(0).to(bias_dtype)
        return dx, None, dbias, None, None
