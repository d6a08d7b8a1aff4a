"""BEFT, Wx + b + δ: only biases are trained, by default those of the value projections (arXiv 2509.15974)."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from peft.config import ModulesConfig
from peft.core.adapter import Adapter, Param
from peft.core.declare import layer_class, tuner_class
from peft.core.defaults import BEFT_TARGETS
from peft.enums import PeftType
from peft.registry import register


@dataclass
class BeftConfig(ModulesConfig):
    """Trained biases of linear and convolutional layers."""

    METHOD: ClassVar = PeftType.BEFT

    init_weights: bool = field(default=True, metadata={"help": "start as the base model (zeros), else at random"})


class Beft(Adapter):
    """y + δ. Merging gives a layer without bias one (upstream refuses)."""

    prefix = "beft_"
    kinds = ("linear", "conv")
    parallel = False  # a sum in any order; so the base alone need not be computed

    beft_bias = Param()  # (1, out)

    def build(self, c, where):
        self.beft_bias = nn.Parameter(torch.empty(1, self.layer.shape[0], **where))

    def reset(self, c):
        if c.init_weights:
            self.beft_bias.zero_()
        else:
            self.beft_bias.normal_()

    def output(self, x, y):
        return y + self.kind.per_out(self.beft_bias)

    def merged_weight(self, W):
        return W

    def merged_bias(self, b, W):
        bias = self.beft_bias.flatten()
        return bias if b is None else (b + bias).to(b.dtype)


BeftLayer = layer_class("BeftLayer", Beft)
BeftModel = tuner_class("BeftModel", BeftLayer, BEFT_TARGETS)
register("BEFT", BeftConfig, tuner=BeftModel, prefix="beft_", mixed=True)
