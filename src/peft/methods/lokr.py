"""LoKr, W + s·(W₁ ⊗ W₂): a Kronecker product, whose factors may be of low rank themselves (arXiv 2309.14859)."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from peft.core.adapter import Param, Val
from peft.core.declare import layer_class, tuner_class
from peft.core.defaults import LORA_TARGETS
from peft.enums import PeftType
from peft.errors import ConfigError
from peft.methods.lycoris import Lycoris, LycorisConfig, LycorisLayer, initialise, parameter, with_kernel
from peft.registry import register


@dataclass
class LoKrConfig(LycorisConfig):
    """LoKr on linear layers and convolutions. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.LOKR

    decompose_both: bool = field(default=False, metadata={"help": "W₁ may be of low rank too, where r is small enough"})
    decompose_factor: int = field(
        default=-1, metadata={"help": "size of W₁, or the largest size it may have; -1: as square as possible"}
    )
    rank_dropout_scale: bool = field(default=False, metadata={"help": "rows that stay make up for those dropped"})
    init_weights: bool | Literal["lycoris"] = field(
        default=True,
        metadata={"help": "start as the base model, with W₁ = 0 or, for 'lycoris', W₂ = 0; False: both at random"},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.decompose_factor < 1 and self.decompose_factor != -1:
            raise ConfigError(f"LoKrConfig.decompose_factor must be positive or -1, got {self.decompose_factor}.")


def factorization(dimension, factor=-1):
    """Two divisors whose product is `dimension`: `factor` and the rest if it divides it, else the smaller one first,
    as large as it can be without exceeding `factor` (-1: no limit)."""
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    limit = math.isqrt(dimension) if factor == -1 else min(factor, math.isqrt(dimension))
    small = next(d for d in range(max(limit, 1), 0, -1) if dimension % d == 0)
    return small, dimension // small


class LoKr(Lycoris):
    """x, seen as a matrix, is multiplied by W₂ on one side and by W₁ on the other; W₁ ⊗ W₂ is never formed."""

    prefix = "lokr_"

    lokr_w1 = Param()  # (l, m), with out = l·k and in = m·n; else its factors
    lokr_w1_a, lokr_w1_b = Param(), Param()  # (l, r), (r, m)
    lokr_w2 = Param()  # (k, n, *kernel); else its factors
    lokr_w2_a, lokr_w2_b = Param(), Param()  # (k, r), (r, n · kernel); with t: (r, k), (r, n)
    lokr_t2 = Param()  # (r, r, *kernel), one-dimensional kernels with a 1 behind
    rank_dropout_scale = Val()

    def build(self, c, where):
        self.read(c)
        self.rescales = self.rank_dropout_scale = c.rank_dropout_scale
        out, inp, *kernel = self.layer.shape
        r, size = self.r, math.prod(kernel)
        (l, k), (m, n) = (factorization(d, c.decompose_factor) for d in (out, inp))
        self.sizes = (k, n, *kernel)
        if c.decompose_both and 2 * r < max(l, m):
            self.lokr_w1_a, self.lokr_w1_b = parameter(l, r, **where), parameter(r, m, **where)
        else:
            self.lokr_w1 = parameter(l, m, **where)
        if 2 * r >= max(k, n):
            self.lokr_w2 = parameter(k, n, *kernel, **where)
        elif c.use_effective_conv2d and size > 1:
            self.lokr_w2_a, self.lokr_w2_b = parameter(r, k, **where), parameter(r, n, **where)
            self.lokr_t2 = parameter(r, r, *kernel, *[1] * (len(kernel) == 1), **where)
        else:
            self.lokr_w2_a, self.lokr_w2_b = parameter(k, r, **where), parameter(r, n * size, **where)

    def reset(self, c):
        zero = {True: (self.lokr_w1, self.lokr_w1_a), "lycoris": (self.lokr_w2, self.lokr_w2_b)}.get(c.init_weights, ())
        for t in self.parameters(frozen=True):
            if any(t is z for z in zero):
                t.zero_()
            else:
                initialise(t)

    def factors(self):
        """W₁ (l, m), and W₂ (k, n, *kernel)."""
        w1, w2, b2 = self.lokr_w1, self.lokr_w2, self.lokr_w2_b
        w1 = self.lokr_w1_a @ self.lokr_w1_b if w1 is None else w1
        if w2 is None:
            t = self.lokr_t2
            w2 = self.lokr_w2_a @ b2 if t is None else self.lokr_w2_a.t() @ with_kernel(t, b2)
        return w1, w2.view(self.sizes)

    def output(self, x, y):
        if getattr(self.base, "groups", 1) > 1 or self.shuffled:
            return super().output(x, y)
        w1, w2 = (w.to(x.dtype) for w in self.factors())
        (l, m), n = w1.shape, w2.shape[1]
        if self.kind.name == "conv":
            x = x if x.ndim == len(self.layer.shape) else x.unsqueeze(0)
            h = self.layer.op(x.unflatten(1, (m, n)).flatten(0, 1), w2)
            h = h.view(len(x), m, -1)
        else:
            h = self.layer.op(x.reshape(-1, m, n), w2)
        w1 = (w1 * self.scaling).expand(len(h), l, m)
        keep = self.kept(h)
        if keep is None:
            return torch.baddbmm(y.reshape(len(h), l, -1).to(h.dtype), w1, h).view(y.shape)
        return y + torch.bmm(w1, h).view(y.shape) * self.kind.per_out(keep)

    def delta_weight(self):
        w1, w2 = self.factors()
        w1 = w1 * self.scaling
        if self.shuffled:
            return torch.kron(w1, w2).reshape(self.layer.shape)
        return torch.kron(w1.view(*w1.shape, *[1] * (w2.ndim - 2)), w2)

    @property
    def shuffled(self):
        """Where upstream multiplies W₁ into the last two of three axes of W₂, and files mean what it made of them."""
        return self.lokr_w2 is not None and self.lokr_w2.ndim == 3


LoKrLayer = layer_class("LoKrLayer", LoKr, LycorisLayer)
LoKrModel = tuner_class("LoKrModel", LoKrLayer, LORA_TARGETS)
register("LOKR", LoKrConfig, tuner=LoKrModel, prefix="lokr_", mixed=True)
