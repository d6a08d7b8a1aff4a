"""The fused low-rank operation: y = W x + b + s·B(A(dropout(x))), optionally with a scale per output row.

Why one autograd.Function: the rank-r products are cheap, passes over the activations are not. So the low-rank part is
added into the base output in place, x is saved by reference (q, k and v share one), nothing is ever saved in another
dtype, the gradient of x is skipped where nobody asks for it, and a dropout mask costs one byte an element.

The low-rank part is computed in the dtype of x, whatever the dtype of A and B (usually float32 master weights);
inside `exact()` it is computed in the dtype of A and B instead, as upstream does. Where a fused step would be wrong
(torch.compile, functorch, autocast, sharded tensors, hooks on the base layer) plain operations take its place.
"""

import contextlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from peft.ops import matmul, product
from peft.ops.dropout import keep_mask

FEW = 16  # rows of x up to which decoding is bound by dispatch
SMALL = 32  # rows of x up to which casting them for a step costs less than casting A and B and their gradients
WIDE = 64  # a rank from which products cost more than passes over the activations, on a CPU

_exact = False


@contextlib.contextmanager
def exact():
    """While inside, low-rank products are computed in the dtype of A and B (slower, and as upstream does it)."""
    global _exact
    before, _exact = _exact, True
    try:
        yield
    finally:
        _exact = before


def is_exact():
    """Whether this is inside `exact()`."""
    return _exact


@dataclass(slots=True)
class LowRank:
    """One adapter as a pair of factors.

    A (r, in), B (out, r), s the scaling, dropout the probability on A's input (0 outside training),
    bias (out,) added after scaling by s, row_scale (out,) multiplies everything but the base layer's bias.
    inner (r,) and outer (out,) multiply what A and B return: trained vectors between frozen bases. Both or neither,
    and then without bias and row_scale.
    """

    A: torch.Tensor
    B: torch.Tensor
    s: float | torch.Tensor
    dropout: float = 0.0
    bias: torch.Tensor | None = None
    row_scale: torch.Tensor | None = None
    inner: torch.Tensor | None = None
    outer: torch.Tensor | None = None

    def absorbed(self):
        """The same without inner and outer."""
        if self.inner is None:
            return self
        return LowRank(self.A * self.inner[:, None], self.B * self.outer[:, None], self.s, self.dropout)


def linear(base, x, f, backend=None):
    """Output of the linear layer `base` adapted by the factors `f`; x (..., in) -> (..., out).

    backend: how the layer's weight is stored; None: as floats.
    """
    W = product.weight_of(base, x, backend) if fusable(x, f) else None
    if W is not None:
        if f.inner is not None:
            return _between_vectors(base, W, x, f)
        if f.dropout or (  # with dropout always: a checkpointed forward without a graph must draw the same mask
            torch.is_grad_enabled()
            and (x.requires_grad or f.A.requires_grad or f.B.requires_grad or f.row_scale is not None)
        ):
            mask, survivors = keep_mask(x.shape, f.dropout, x.device) if f.dropout else (None, 1.0)
            return LinearLowRank.apply(
                x, W, base.bias, f.A, f.B, f.bias, f.row_scale, float(f.s), mask, float(survivors)
            )
        if f.row_scale is None:
            return _inference(base, W, x, f)
    return add(base, base(x), x, f)


def add(base, y, x, f):
    """y + low-rank part of x, in plain operations. `base` is asked for its bias only where f has a row scale."""
    more = update(x, f)
    if f.row_scale is None:
        return (y + more).to(y.dtype)
    bias = 0 if base.bias is None else base.bias
    return ((y - bias + more) * f.row_scale + bias).to(y.dtype)


def update(x, f, acts=None):
    """The low-rank part of x without f's row scale.

    acts (..., 1) or (..., r) multiplies what A returns, for factors that act on some tokens only; with a bias (..., 1).
    """
    h = input_of(x, f)
    h = F.linear(h, f.A.to(h.dtype))
    if f.inner is not None:
        h = F.linear(h * (f.inner * f.s).to(h.dtype), f.B.to(h.dtype)) * f.outer.to(h.dtype)
    elif acts is not None:
        h = F.linear(h * (acts * f.s).to(h.dtype), f.B.to(h.dtype))
    else:
        h = F.linear(h, f.B.to(h.dtype)) * f.s
    if f.bias is None:
        return h
    bias = f.bias.to(h.dtype) * f.s
    return h + (bias if acts is None else bias * acts.to(bias.dtype))


def input_of(x, f):
    """x as f's A gets it: after dropout, in the dtype that the products are computed in."""
    storage_only = f.A.dtype.itemsize == 1  # float8: nothing computes in it
    dtype = f.A.dtype if (_exact and not storage_only) or not x.is_floating_point() else x.dtype
    h = F.dropout(x, f.dropout) if f.dropout else x
    return h if torch.is_autocast_enabled(x.device.type) else h.to(dtype)


def fusable(x, f):
    """Whether the low-rank part of x can be fused into a product."""
    return type(f.s) is float and not (_exact and f.A.dtype != x.dtype)


def _inference(base, W, x, f):
    """No graph, no dropout, no row scale: two small products on top of the base's."""
    if callable(W):  # its library has better ways to multiply once
        y = base(x)
        y = y if f.bias is None else y.add_(f.bias.to(y.dtype), alpha=f.s)
    else:
        y = product.of(base)(x, W, base.bias if f.bias is None else _plus(base.bias, f.bias, f.s).to(x.dtype))
    if x.is_cpu and f.A.dtype is torch.float32 and x.dtype is not torch.float32 and x.numel() <= FEW * x.shape[-1]:
        # So few rows are bound by the number of operations: casting x costs less than casting A and B.
        return y.add_(F.linear(F.linear(x.float(), f.A), f.B), alpha=f.s)
    h = F.linear(x, f.A.to(x.dtype))
    y.view(-1, y.shape[-1]).addmm_(h.view(-1, h.shape[-1]), f.B.to(x.dtype).t(), alpha=f.s)
    return y


def _between_vectors(base, W, x, f):
    """Plain operations in place: A and B are not trained, so x need not be kept.

    To multiply B's rows by `outer` keeps nothing of the output's size for the gradient, but costs a product of rank r
    there; on the CPU that is cheaper than passes over the output only while r is small.
    """
    x2, s = x.reshape(-1, x.shape[-1]), f.s
    y = base(x2) if callable(W) and not torch.is_grad_enabled() else product.linear(x2, W, base.bias)
    if f.dropout:
        mask, survivors = keep_mask(x2.shape, f.dropout, x.device)
        x2, s = x2 * mask, s * survivors
    if x.itemsize < 4 and f.A.dtype is torch.float32 and len(x2) <= FEW:
        x2 = x2.float()  # costs less than casting A and B
    A, B = f.A.to(x2.dtype), f.B.to(x2.dtype)
    h = F.linear(x2, A) * (f.inner * s).to(x2.dtype)
    if h.dtype is not y.dtype or len(h) < len(A) or (x.is_cpu and len(A) > WIDE):
        y.add_(F.linear(h, B) * f.outer.to(h.dtype))
    else:
        y.addmm_(h, (B * f.outer.to(h.dtype)[:, None]).t())
    return y.view(*x.shape[:-1], y.shape[-1])


def _plus(bias, extra, s):
    extra = extra * s
    return extra if bias is None else (bias + extra).to(bias.dtype)


class LinearLowRank(torch.autograd.Function):
    """x, W, b, A, B -> row_scale * (x Wᵀ + s·(mask∘x) Aᵀ Bᵀ) + b. W, a tensor or what makes one, gets no gradient.

    Computed in W's dtype, which only for a quantized base may differ from that of x.
    """

    @staticmethod
    def forward(ctx, x, W, bias, A, B, extra_bias, row_scale, s, mask, survivors):
        ctx.W, W = (None, W) if isinstance(W, torch.Tensor) else (W, W())
        x2 = x.reshape(-1, x.shape[-1]).to(W.dtype)
        mask = None if mask is None else mask.view(x2.shape)
        low = A.dtype if x.is_cpu and A.dtype is torch.float32 and len(x2) <= SMALL else x2.dtype
        At, Bt = A.to(low).t(), B.to(low).t()
        scale = s * survivors
        h = (x2 if mask is None else x2 * mask).to(low) @ At
        full_bias = bias if extra_bias is None or row_scale is not None else _plus(bias, extra_bias, s)
        y0 = None
        if row_scale is None:
            y = matmul.linear(x2, W, None if full_bias is None else full_bias.to(x2.dtype))
            add_product(y, h, Bt, scale)
        else:
            y0 = matmul.linear(x2, W)
            add_product(y0, h, Bt, scale)
            if extra_bias is not None:
                y0.add_(extra_bias.to(y0.dtype), alpha=s)
            y = scaled(y0, row_scale)
            y = y if bias is None else y.add_(bias.to(y.dtype))
        ctx.save_for_backward(x, W if ctx.W is None else None, A, B, h, row_scale, y0, mask)
        ctx.s, ctx.scale, ctx.has, ctx.dtype = s, scale, (bias, extra_bias), x2.dtype
        return y.view(*x.shape[:-1], y.shape[-1]).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled():  # double backward: everything must depend on x, A and B again
            return LinearLowRank._differentiable_backward(ctx, g)
        x, W, A, B, h, row_scale, y0, mask = ctx.saved_tensors
        low = h.dtype
        needs_x, _, needs_bias, needs_A, needs_B, needs_extra, needs_scale = ctx.needs_input_grad[:7]
        bias, extra_bias = ctx.has
        g = g.reshape(-1, g.shape[-1]).to(ctx.dtype)
        dx = dbias = dA = dB = dextra = dscale = part = None
        if needs_bias:
            dbias = g.sum(0).to(bias.dtype)
        if row_scale is not None:
            if needs_scale:
                dscale = (g * y0).sum(0, dtype=row_scale.dtype)
            g = scaled(g, row_scale)
        if needs_extra:
            dextra = g.sum(0, dtype=extra_bias.dtype) * ctx.s
        g_low = g.to(low)
        if needs_B:  # (hᵀg)ᵀ is up to three times faster than gᵀh
            dB = (h.t() @ g_low).mul_(ctx.scale).to(B.dtype).t()
        if needs_A or needs_x:
            gh = (g_low @ B.to(low)).mul_(ctx.scale)
        if needs_x:
            dx = matmul.matmul(g, W if ctx.W is None else ctx.W())
            if mask is None:
                add_product(dx, gh, A.to(low), 1.0)
            else:
                part = gh @ A.to(low)
                dx.add_(part.mul_(mask))
            dx = dx.view(x.shape).to(x.dtype)
        if needs_A:  # `part` has served: dropout's x is built in its memory
            x2 = x.reshape(-1, x.shape[-1]).to(low)
            dropped = x2 if mask is None else torch.mul(x2, mask, out=part)
            dA = (gh.t() @ dropped).to(A.dtype)
        return dx, None, dbias, dA, dB, dextra, dscale, None, None, None

    @staticmethod
    def _differentiable_backward(ctx, g):
        x, W, A, B, _, c, _, mask = ctx.saved_tensors
        _, extra_bias = ctx.has
        W = W if ctx.W is None else ctx.W()
        x2, g = x.reshape(-1, x.shape[-1]).to(W.dtype), g.reshape(-1, g.shape[-1]).to(W.dtype)
        dropped = x2 if mask is None else x2 * mask
        h = dropped @ A.to(g.dtype).t()
        dbias = g.sum(0) if ctx.needs_input_grad[2] else None
        dscale = None
        if c is not None:
            y0 = x2 @ W.t() + (h @ B.to(g.dtype).t()) * ctx.scale
            y0 = y0 if extra_bias is None else y0 + extra_bias.to(y0.dtype) * ctx.s
            dscale = (g * y0).sum(0).to(c.dtype)
            g = scaled(g, c)
        gh = (g @ B.to(g.dtype)) * ctx.scale
        part = gh @ A.to(g.dtype)
        dx = (g @ W + (part if mask is None else part * mask)).view(x.shape).to(x.dtype)
        dA, dB = (gh.t() @ dropped).to(A.dtype), (g.t() @ h).to(B.dtype) * ctx.scale
        dextra = None if extra_bias is None else g.sum(0).to(extra_bias.dtype) * ctx.s
        return dx, None, dbias, dA, dB, dextra, dscale, None, None, None


def scaled(y, row_scale):
    """y times row_scale. Its entries are near 1, and half precision keeps their distance from 1 better than them."""
    return torch.addcmul(y, y, (row_scale - 1).to(y.dtype))


def add_product(y, a, b, scale):
    """y += scale·ab, in y's memory; a and b may be of a wider dtype."""
    if a.dtype is y.dtype:
        y.addmm_(a, b, alpha=scale)
    else:
        y.add_(a @ b, alpha=scale)


def frobenius_rows(W, A, B, s, squared_norm):
    """‖W + s·BA‖ of each row without forming BA; W (out, in), A (r, in), B (out, r) -> (out,), float32.

    Uses ‖W‖² + 2s⟨W, BA⟩ + s²‖BA‖², where squared_norm is the rows' ‖W‖² (arXiv 2603.22276).
    """
    B32 = B.float()
    cross = (F.linear(A.to(W.dtype), W).t().float() * B32).sum(1)  # ⟨W, BA⟩ = Σ_r B · (W Aᵀ)
    gram = A.float() @ A.float().t()
    square = ((B32 @ gram) * B32).sum(1)
    total = squared_norm + 2 * s * cross + s * s * square
    return total.clamp_(min=0).sqrt_() if not torch.is_grad_enabled() else total.clamp(min=0).sqrt()
