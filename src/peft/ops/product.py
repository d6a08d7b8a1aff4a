"""Products with a base weight that may be stored in few bits: it is made for one product, and again for its gradient.

Where an operation takes a weight W, it may be a tensor, or a function that makes one: nothing keeps what it returns.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as module_globals

from peft.ops import matmul


def weight_of(base, x, backend):
    """The weight in x Wᵀ + b where calling `base` on x is nothing but that product, so that it need not be called.

    A tensor in x's dtype; a function that makes one, in the dtype that the layer computes in; or None.
    """
    if transparent(base, x):
        return base._parameters["weight"]
    if backend is None or not backend.name or not _untouched(base, x, backend.hooks):
        return None
    return backend.maker(base, x) if x.is_floating_point() else None


def transparent(base, x):
    """Whether `base` is a float layer that only multiplies by its weight."""
    if type(base) not in LINEARS or not _untouched(base, x):
        return False
    W = base._parameters["weight"]
    return type(W) is nn.Parameter and not W.requires_grad and x.dtype == W.dtype


def _untouched(base, x, own=()):
    """Whether nothing takes part in a call of `base` but its own forward, and hooks of our own."""
    if not matmul.is_plain(x) or type(x) not in (torch.Tensor, nn.Parameter):
        return False
    before = base._forward_pre_hooks
    return not (
        base._forward_hooks
        or base._backward_hooks
        or base._backward_pre_hooks
        or (before and not all(hook in own for hook in before.values()))
        or "forward" in base.__dict__  # accelerate and others replace it
        or module_globals._has_any_global_hook()
    )


def made(W):
    """W, or what it makes."""
    return W() if callable(W) else W


def linear(x, W, bias):
    """x (..., in) -> x Wᵀ + bias (..., out); W gets no gradient."""
    return Product.apply(x, W, bias) if callable(W) or matmul.gains(x, W) else F.linear(x, W, bias)


class Product(torch.autograd.Function):
    """x (..., in), W or a function that makes it, bias -> x Wᵀ + bias, keeping nothing but W or that function."""

    @staticmethod
    def forward(ctx, x, W, bias):
        ctx.W, ctx.bias, weight = W if callable(W) else None, bias, made(W)
        ctx.save_for_backward(None if callable(W) else W)  # so that writing to it before backward is an error
        bias = None if bias is None else bias.to(weight.dtype)
        return matmul.linear(x.to(weight.dtype), weight, bias).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            W = ctx.saved_tensors[0] if ctx.W is None else ctx.W()
            g2 = g.reshape(-1, g.shape[-1]).to(W.dtype)
            dx = matmul.matmul(g2, W).view(*g.shape[:-1], -1).to(g.dtype)
        if ctx.needs_input_grad[2]:
            dbias = g.reshape(-1, g.shape[-1]).sum(0).to(ctx.bias.dtype)
        return dx, None, dbias


class OneDnnLinear(nn.Linear):
    """An nn.Linear whose weight, while it is frozen, oneDNN multiplies: in training, or if `always` everywhere."""

    always = False

    def forward(self, x):
        wanted = (self.always or (torch.is_grad_enabled() and x.requires_grad)) and matmul.is_plain(x)
        if not wanted or not matmul.gains(x, self.weight) or not transparent(self, x):
            return super().forward(x)
        return Product.apply(x, self.weight, self.bias)

    def _get_name(self):
        return nn.Linear.__name__


LINEARS = (nn.Linear, OneDnnLinear)  # layers that are nothing but a product


def of(base):
    """x, W, bias -> x Wᵀ + bias as the layer `base` computes it where no gradient is wanted."""
    return matmul.linear if type(base) is OneDnnLinear and base.always else F.linear
