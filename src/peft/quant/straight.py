"""Gradients for kernels that have none: the float weight that the stored one stands for carries them to x.

Without this, everything in front of such a layer would silently be trained on a part of its gradient.
"""

import torch


class Carry:
    """A forward hook; it does nothing where the kernel itself is differentiable."""

    def __init__(self, backend):
        self.backend = backend

    def __call__(self, base, args, y):
        x = args[0]
        if y.requires_grad or not torch.is_grad_enabled() or not x.requires_grad:
            return None
        return StraightThrough.apply(x, y, base, self.backend)


def attach(base, backend):
    """Make `base` differentiable in its input; a second call changes nothing."""
    if not any(isinstance(hook, Carry) for hook in base._forward_hooks.values()):
        base.register_forward_hook(Carry(backend))


def detach(base):
    """Undo `attach`."""
    for key in [k for k, hook in base._forward_hooks.items() if isinstance(hook, Carry)]:
        del base._forward_hooks[key]


class StraightThrough(torch.autograd.Function):
    """x (..., in), y (..., out) that a kernel made of it -> y, with the gradient of x Wᵀ."""

    @staticmethod
    def forward(ctx, x, y, base, backend):
        ctx.base, ctx.backend = base, backend
        return y.view_as(y)

    @staticmethod
    def backward(ctx, g):
        base, backend = ctx.base, ctx.backend
        W = backend.unpack(base, backend.get(base, "weight"))
        return g @ W.to(g.dtype), None, None, None
