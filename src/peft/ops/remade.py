"""A linear layer under an adapter that forms its update dW anyway: y = x (W + dW)ᵀ + b, in one product instead of two.

Only x and the adapter's own tensors are kept for the backward pass, which makes W + dW anew: kept for all layers, it
would be a second copy of the model. So is W itself where the base is quantized. Two products remain where one would do
harm: with dropout, which dW alone sees, and in half precision, where W + dW would round small updates away (unless the
adapter says that it `rounds`).
"""

import torch

from peft.ops import lowrank, matmul, product
from peft.ops.dropout import keep_mask


def output(layer, adapter, x):
    """The adapted layer's output for x (..., in), or None where the adapter's own `output` must, or had better, act."""
    p, base = adapter.remakes(), layer._modules["base_layer"]
    if p is None or x.numel() < adapter.remakes_from * x.shape[-1]:
        return None
    W = product.weight_of(base, x, layer.backend)
    if W is None or (lowrank.is_exact() and x.dtype.itemsize < 4):
        return None
    learns = p or torch.is_grad_enabled()  # with dropout always: a checkpointed forward must draw the same mask
    if not learns and (callable(W) or x.numel() <= lowrank.FEW * x.shape[-1]):
        return None  # so few rows cost less than adding dW to W does; and libraries have better ways to multiply once
    bias = adapter.merged_bias(base.bias, product.made(W)) if adapter.changes_bias else base.bias
    if learns:
        mask, scale = keep_mask(x.shape, p, x.device) if p else (None, 1.0)
        y = Remade.apply(x, W, bias, adapter, mask, scale, *adapter.parameters(frozen=True))
    else:
        y = _forward(x.reshape(-1, x.shape[-1]), W, bias, adapter, None, 1.0, product.of(base)).view(*x.shape[:-1], -1)
    aside = adapter.aside()
    return y if aside is None else lowrank.add(base, y, x, aside)


def _forward(x, W, bias, adapter, mask, scale, multiply=matmul.linear):
    """x (rows, in) -> (rows, out), computed in W's dtype, which only for a quantized base may differ from that of x."""
    W = product.made(W)
    dtype, x = x.dtype, x.to(W.dtype)
    bias = None if bias is None else bias.to(W.dtype)
    if mask is None and (adapter.rounds or x.dtype.itemsize >= 4):
        return multiply(x, adapter.remade_weight(W), bias).to(dtype)
    update = adapter.delta(_wide(W)).to(x.dtype)
    return multiply(x, W, bias).addmm_(x if mask is None else x * mask, update.t(), alpha=scale).to(dtype)


def _wide(W):
    return W if W.dtype.itemsize >= 4 else W.float()


class Remade(torch.autograd.Function):
    """x, W, bias, parameters of the adapter -> x (W + dW)ᵀ + bias. W gets no gradient."""

    @staticmethod
    def forward(ctx, x, W, bias, adapter, mask, scale, *params):
        x2 = x.reshape(-1, x.shape[-1])
        mask = None if mask is None else mask.view(x2.shape)
        ctx.W, kept = (None, W) if isinstance(W, torch.Tensor) else (W, None)
        ctx.save_for_backward(x, kept, mask, *params)  # params: so that writing to them before backward is an error
        ctx.adapter, ctx.params, ctx.scale = adapter, params, scale
        y = _forward(x2, W, bias, adapter, mask, scale)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx, g):
        x, W, mask, *_ = ctx.saved_tensors
        W = W if ctx.W is None else ctx.W()
        params, scale, again = ctx.params, ctx.scale, torch.is_grad_enabled()
        if [*map(id, params)] != [*map(id, ctx.adapter.parameters(frozen=True))]:
            raise RuntimeError("An adapter's parameters were replaced between its forward and backward pass.")
        needs_x, _, needs_bias, *_ = ctx.needs_input_grad
        trained = [p for p, needed in zip(params, ctx.needs_input_grad[6:]) if needed]
        x2, g = x.reshape(-1, x.shape[-1]).to(W.dtype), g.reshape(-1, g.shape[-1]).to(W.dtype)
        with torch.set_grad_enabled(bool(trained)):
            W0 = W if ctx.adapter.rounds else _wide(W)
            new = ctx.adapter.remade_weight(W0) if mask is None else ctx.adapter.delta(W0)
        dx, found = None, {}
        if needs_x:
            dx = matmul.matmul(g, (new if again else new.detach()).to(g.dtype))
            if mask is not None:
                dx = torch.addcmul(matmul.matmul(g, W), dx, mask, value=scale)
            dx = dx.view(x.shape).to(x.dtype)
        if trained:
            dnew = matmul.matmul(g.t(), x2 if mask is None else x2 * mask).to(new.dtype)
            dnew = dnew if mask is None else dnew * scale
            grads = torch.autograd.grad(new, trained, dnew, create_graph=again, allow_unused=True)
            found = {id(p): d for p, d in zip(trained, grads)}
        dbias = g.sum(0) if needs_bias else None
        return dx, None, dbias, None, None, None, *(found.get(id(p)) for p in params)
