"""PEANuT, W + s·B·f(A W): a small network f makes the update from the base weight itself (arXiv 2410.01870)."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from peft.config import TargetConfig
from peft.core.adapter import Adapter, Mod, Val
from peft.core.declare import layer_class, tuner_class
from peft.core.defaults import LORA_TARGETS
from peft.core.validate import check_range
from peft.enums import PeftType
from peft.errors import ConfigError
from peft.layers.linear import linear
from peft.ops import lowrank
from peft.ops.lowrank import LowRank
from peft.registry import register


def activations():
    """{name: activation}; transformers is loaded only when a config asks."""
    from transformers.activations import ACT2FN

    return ACT2FN


@dataclass
class PeanutConfig(TargetConfig):
    """PEANuT on linear layers. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.PEANUT

    r: int = field(default=32, metadata={"help": "width of the network"})
    depth: int = field(default=0, metadata={"help": "encoder and decoder layers between A and B, this many of each"})
    act_fn: str = field(default="relu", metadata={"help": "activation, by its name in transformers"})
    scaling: float = field(default=1.0, metadata={"help": "the update is multiplied by this"})
    init_weights: bool = field(default=True, metadata={"help": "start as the base model (B = 0), else at random"})

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "r", 1)
        check_range(self, "depth", 0)
        check_range(self, "scaling")
        if self.act_fn not in activations():
            names = ", ".join(sorted(activations()))
            raise ConfigError(f"PeanutConfig.act_fn must be one of {names}, got {self.act_fn!r}.")


class Peanut(Adapter):
    """y + s·B(f(A W) x): f(A W) is (r, in), so x passes through rank r, never through (out, in)."""

    prefix = "peanut_"

    peanut_A, peanut_B = Mod(), Mod()  # out -> r, r -> out
    peanut_encoders, peanut_decoders = Mod(), Mod()  # lists of r -> r
    r, depth, scaling, act_fn = Val(), Val(), Val(), Val()

    def build(self, c, where):
        self.r, self.depth, self.scaling = c.r, c.depth, float(c.scaling)
        self.act_fn = nn.LeakyReLU(0.25) if c.act_fn == "prelu" else activations()[c.act_fn]  # its slope is not trained
        out = self.layer.shape[0]
        self.peanut_A, self.peanut_B = linear(out, c.r, False, **where), linear(c.r, out, False, **where)
        if c.depth:
            self.peanut_encoders, self.peanut_decoders = (
                nn.ModuleList(linear(c.r, c.r, False, **where) for _ in range(c.depth)) for _ in range(2)
            )

    def reset(self, c):
        for p in self.parameters(frozen=True):
            nn.init.kaiming_uniform_(p, a=math.sqrt(5))
        if c.init_weights:
            self.peanut_B.weight.zero_()

    def read(self, W, dtype):
        """f(A W), (r, in): the large product in W's dtype, the network in `dtype`."""
        act = self.act_fn
        h = act((self.peanut_A.weight.to(W.dtype) @ W).to(dtype))
        skipped = []
        for encoder in self.peanut_encoders or ():
            skipped.append(h)
            h = act(encoder.weight.to(dtype) @ h)
        for decoder in self.peanut_decoders or ():
            h = act(decoder.weight.to(dtype) @ h) + skipped.pop()
        return h

    def native_scaling(self):
        return self.config.scaling

    def low_rank(self):
        W, B = self.base_weight(), self.peanut_B.weight
        return LowRank(self.read(W.to(B.dtype) if lowrank.is_exact() else W, B.dtype), B, self.scaling)

    def output(self, x, y):
        return lowrank.add(self.base, y, x, self.low_rank())

    def delta(self, W):
        return self.scaling * (self.peanut_B.weight.to(W.dtype) @ self.read(W, W.dtype))

    def merged_weight(self, W):
        return W + self.delta(W)


PeanutLayer = layer_class("PeanutLayer", Peanut)
PeanutModel = tuner_class("PeanutModel", PeanutLayer, LORA_TARGETS)
register("PEANUT", PeanutConfig, tuner=PeanutModel, prefix="peanut_")
