"""LoHa, W + s·(A₁B₁)∘(A₂B₂): the elementwise product of two low-rank matrices (arXiv 2108.06098)."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

from peft.core.adapter import Param
from peft.core.declare import layer_class, tuner_class
from peft.core.defaults import LORA_TARGETS
from peft.enums import PeftType
from peft.layers.conv import OPS
from peft.methods.lycoris import Lycoris, LycorisConfig, LycorisLayer, initialise, parameter, with_kernel
from peft.ops.lowrank import LowRank
from peft.registry import register


@dataclass
class LoHaConfig(LycorisConfig):
    """LoHa on linear layers and convolutions. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.LOHA

    init_weights: bool = field(default=True, metadata={"help": "start as the base model (B₂ = 0), else at random"})


class LoHa(Lycoris):
    """The product of two matrices of rank r has rank r², and its two factors are known: where r² is small, x passes
    through them, and (A₁B₁)∘(A₂B₂) is never formed."""

    prefix = "hada_"

    hada_w1_a, hada_w1_b = Param(), Param()  # (out, r), (r, in · kernel); with t: (r, out), (r, in)
    hada_w2_a, hada_w2_b = Param(), Param()
    hada_t1, hada_t2 = Param(), Param()  # (r, r, *kernel), one-dimensional kernels with a 1 behind

    def build(self, c, where):
        self.read(c)
        out, inp, *kernel = self.layer.shape
        r, size = self.r, math.prod(kernel)
        effective = c.use_effective_conv2d and size > 1
        a, b = ((r, out), (r, inp)) if effective else ((out, r), (r, inp * size))
        self.hada_w1_a, self.hada_w1_b = parameter(*a, **where), parameter(*b, **where)
        self.hada_w2_a, self.hada_w2_b = parameter(*a, **where), parameter(*b, **where)
        if effective:
            t = (r, r, *kernel) if len(kernel) > 1 else (r, r, *kernel, 1)
            self.hada_t1, self.hada_t2 = parameter(*t, **where), parameter(*t, **where)
        groups = getattr(self.base, "groups", 1)  # one product with W + delta costs as much as three of rank r²
        self.through_factors = 3 * r * r * (out + inp * size) < 2 * out * inp * size and groups == 1

    def reset(self, c):
        for t in self.parameters(frozen=True):
            if c.init_weights and t is self.hada_w2_b:
                t.zero_()
            else:
                initialise(t)

    def pairs(self):
        """A₁ (out, r), B₁ (r, in · kernel), A₂, B₂."""
        a1, b1, a2, b2 = self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b
        if (t1 := self.hada_t1) is None:
            return a1, b1, a2, b2
        return a1.t(), with_kernel(t1, b1), a2.t(), with_kernel(self.hada_t2, b2)

    def factors(self):
        """A (r², in · kernel) and B (out, r²) with BA = (A₁B₁)∘(A₂B₂): each row of one times each of the other."""
        a1, b1, a2, b2 = self.pairs()
        B = (a1.unsqueeze(2) * a2.unsqueeze(1)).flatten(1)
        keep = self.kept(B)
        return (b1.unsqueeze(1) * b2).flatten(0, 1), B if keep is None else B * keep[:, None]

    def low_rank(self):
        return LowRank(*self.factors(), self.scaling) if self.through_factors else None

    def output(self, x, y):
        if self.kind.name != "conv" or not self.through_factors:
            return super().output(x, y)
        A, B = self.factors()
        shape = self.layer.shape
        h = self.layer.op(x, A.view(-1, *shape[1:]).to(x.dtype))
        return y + OPS[len(shape)](h, (B * self.scaling).view(*B.shape, *[1] * len(shape[2:])).to(h.dtype))

    def remakes(self):
        return None if self.drops else 0.0

    def delta_weight(self):
        a1, b1, a2, b2 = self.pairs()
        return ((a1 * self.scaling @ b1) * (a2 @ b2)).view(self.layer.shape)


LoHaLayer = layer_class("LoHaLayer", LoHa, LycorisLayer)
LoHaModel = tuner_class("LoHaModel", LoHaLayer, LORA_TARGETS)
register("LOHA", LoHaConfig, tuner=LoHaModel, prefix="hada_", mixed=True)
