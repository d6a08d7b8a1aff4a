"""The bottleneck y + s·(U f(D z + d) + u), fused: few passes over the activations, and few steps for autograd.

The sum is made by the product with U, in the memory that it needs anyway; of the bottleneck only what goes into f and
what comes out of it are kept for the backward pass.
"""

import torch
import torch.nn.functional as F
from torch import nn


def _tanh_gelu(x):
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def _linear(x):
    return x


ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": _tanh_gelu,
    "quick_gelu": _quick_gelu,
    "swish": F.silu,
    "silu": F.silu,
    "leakyrelu": F.leaky_relu,
    "relu6": F.relu6,
    "elu": F.elu,
    "mish": F.mish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "linear": _linear,
}


def _relu_back(g, p):
    return torch.ops.aten.threshold_backward(g, p, 0)


def _tanh_gelu_back(g, p):
    return torch.ops.aten.gelu_backward(g, p, approximate="tanh")


BACK = {  # gradient at f's output, f's input -> gradient at f's input; the others are not fused
    F.relu: _relu_back,
    F.gelu: torch.ops.aten.gelu_backward,
    _tanh_gelu: _tanh_gelu_back,
    F.silu: torch.ops.aten.silu_backward,
}


def add(y, z, D, d, U, u, f, s):
    """y + s·(U f(D z + d) + u); y (..., out), z (..., in), D (size, in), U (out, size), s a number."""
    tensors = (y, z, D, d, U, u)
    if d is None or u is None or not fusable(tensors, f):
        more = plain(z, D, d, U, u, f)
        return y + (more if s == 1 else more * s)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return Fused.apply(y, None if z is y else z, D, d, U, u, f, s)
    return _forward(y, z, D, d, U, u, f, s)[0]


def plain(z, D, d, U, u, f):
    """U f(D z + d) + u."""
    return F.linear(f(F.linear(z, D, d)), U, u)


def fusable(tensors, f):
    """Whether one step of ours may take the place of torch's."""
    return (
        f in BACK
        and not torch.compiler.is_compiling()
        and all(type(t) in (torch.Tensor, nn.Parameter) for t in tensors)
        and len({t.dtype for t in tensors}) == 1
        and not torch.is_autocast_enabled(tensors[0].device.type)
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _forward(y, z, D, d, U, u, f, s):
    """(the sum, f's input, f's output)."""
    y2, z2 = y.reshape(-1, y.shape[-1]), z.reshape(-1, z.shape[-1])
    p = torch.addmm(d, z2, D.t())
    a = f(p)
    return torch.addmm(y2, a, U.t(), alpha=s).add_(u, alpha=s).view(y.shape), p, a


class Fused(torch.autograd.Function):
    """y, z (None: y), D, d, U, u -> y + s·(U f(D z + d) + u)."""

    @staticmethod
    def forward(ctx, y, z, D, d, U, u, f, s):
        out, p, a = _forward(y, y if z is None else z, D, d, U, u, f, s)
        ctx.save_for_backward(y if z is None else z, D, d, U, u, p, a)
        ctx.f, ctx.s, ctx.same = f, s, z is None
        return out

    @staticmethod
    def backward(ctx, g):
        z, D, d, U, u, p, a = ctx.saved_tensors
        f, s, same, needs = ctx.f, ctx.s, ctx.same, ctx.needs_input_grad
        if torch.is_grad_enabled():
            return _differentiable_backward(g, z, (D, d, U, u), f, s, same)
        g2, z2 = g.reshape(-1, g.shape[-1]), z.reshape(-1, z.shape[-1])
        dD = dd = dU = du = dz = None
        if needs[4] or needs[5]:
            dU, du = (a.t() @ g2).mul_(s).t(), g2.sum(0).mul_(s)  # up to three times faster than gᵀa
        if needs[0] or needs[1] or needs[2] or needs[3]:
            gp = BACK[f]((g2 @ U).mul_(s), p)
            dD, dd = (gp.t() @ z2, gp.sum(0)) if needs[2] or needs[3] else (None, None)
            if needs[0] if same else needs[1]:
                dz = (torch.addmm(g2, gp, D) if same else gp @ D).view(z.shape)
        return (dz, None, dD, dd, dU, du, None, None) if same else (g, dz, dD, dd, dU, du, None, None)


def _differentiable_backward(g, z, weights, f, s, same):
    """For second derivatives: the gradients by plain operations, which depend on z and the weights again."""
    with torch.enable_grad():
        inputs = [t for t in (z, *weights) if t.requires_grad]
        found = torch.autograd.grad(plain(z, *weights, f) * s, inputs, g, create_graph=True)
    dz, *rest = (found[[t is i for i in inputs].index(True)] if t.requires_grad else None for t in (z, *weights))
    return (g if dz is None else g + dz, None, *rest, None, None) if same else (g, dz, *rest, None, None)
