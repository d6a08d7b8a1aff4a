"""nn.Linear, everything that looks like one (quantized linears included), and transformers' Conv1D."""

import torch
import torch.nn.functional as F
from torch import nn

from peft.layers.kind import Kind, bare
from peft.ops import banks, folded, lowrank, product, remade


class Linear(Kind):
    """Anything with in_features and out_features."""

    name = "linear"

    @staticmethod
    def owns(base):
        return hasattr(base, "in_features") and hasattr(base, "out_features")

    def shape(self, base):
        return base.out_features, base.in_features

    def unquantized(self, base):
        """transformers makes quantized layers of its Conv1D too, with the weight turned round, and notes the class."""
        return Conv1D() if getattr(getattr(base, "source_cls", None), "__name__", "") == "Conv1D" else self

    def op(self, base, x, W):
        return F.linear(x, W)

    def factors(self, base, r, bias, **where):
        out, inp = self.shape(base)
        return linear(inp, r, False, **where), linear(r, out, bias, **where)

    def factor_delta(self, A, B):
        return B @ A

    def call(self, layer, active, x, *args, **kwargs):
        """Adapters that are a pair of factors take the fused path; the others the general one."""
        if args or kwargs or not active or layer.merged:
            return super().call(layer, active, x, *args, **kwargs)
        if not torch.is_grad_enabled() and (y := folded.output(layer, active, x)) is not None:
            return y
        if len(active) == 1:
            a, base = active[0], layer._modules["base_layer"]
            f = a.low_rank()
            if f is not None:
                return lowrank.linear(base, x, f, layer.backend)
            if product.transparent(base, x) and (y := a.instead(x)) is not None:
                return y
            if (y := remade.output(layer, a, x)) is not None:
                return y
            return super().call(layer, active, x)
        factors = [a.low_rank() for a in active]
        if None in factors or any(f.row_scale is not None for f in factors):
            return super().call(layer, active, x)
        y = lowrank.linear(layer.base_layer, x, factors[0], layer.backend)
        for f in factors[1:]:
            y = lowrank.add(layer.base_layer, y, x, f)
        return y

    def mixed(self, layer, plan, x, *args, **kwargs):
        """All adapters in one pair of batched products where they are pairs of factors and nothing needs a gradient."""
        if args or kwargs or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            return super().mixed(layer, plan, x, *args, **kwargs)
        bank = banks.of(layer, plan.names, x)
        if bank is None:
            return super().mixed(layer, plan, x)
        return banks.add(layer.backend.guard(layer.base_layer(x)), x, bank, plan)


class Conv1D(Linear):
    """transformers' Conv1D: a linear layer whose weight is stored (in, out)."""

    @staticmethod
    def owns(base):
        return type(base).__name__ == "Conv1D" and hasattr(base, "nf")

    def shape(self, base):
        inp, out = base.weight.shape
        return out, inp

    def canon(self, W):
        return W.T

    def uncanon(self, W):
        return W.T


class Eetq(Linear):
    """transformers' EetqLinear, which says its widths by nothing but its int8 weight (in, out)."""

    @staticmethod
    def owns(base):
        return type(base).__name__ == "EetqLinear" and not hasattr(base, "in_features")

    def shape(self, base):
        inp, out = base.weight.shape
        return out, inp


def linear(inp, out, bias, **where):
    """An nn.Linear whose parameters are uninitialised memory."""
    return bare(
        nn.Linear,
        {"in_features": inp, "out_features": out},
        weight=torch.empty(out, inp, **where),
        bias=torch.empty(out, **where) if bias else None,
    )
