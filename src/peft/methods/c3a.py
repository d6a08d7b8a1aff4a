"""C3A: an update made of circulant blocks, each of one trained row (arXiv 2407.19342)."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn

from peft.config import LayersConfig
from peft.core import match
from peft.core.adapter import Additive, Param, Val
from peft.core.declare import layer_class, tuner_class
from peft.core.defaults import C3A_TARGETS
from peft.core.validate import check_range
from peft.enums import PeftType
from peft.errors import ConfigError
from peft.registry import register


@dataclass
class C3AConfig(LayersConfig):
    """C3A on linear layers. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.C3A

    block_size: int = field(default=256, metadata={"help": "side of a block, a divisor of both sides of W"})
    bias: Literal["none", "all", "c3a_only"] = field(default="none", metadata={"help": "base biases to train"})
    block_size_pattern: dict[str, int] | None = field(
        default_factory=dict, metadata={"help": "other block sizes by layer name, name ending or regex"}
    )
    init_weights: bool | Literal["gaussian", "kaiming_uniform", "xavier_uniform"] | None = field(
        default="xavier_uniform", metadata={"help": "True: start as the base model; else how the rows start"}
    )

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "block_size", 1)


class C3A(Additive):
    """Block (m, n) of the update has entry (k, j) kernel[m, n, (j − k) mod b] / in.

    Several active ones add up; in upstream each acts on what the last one gave.
    """

    prefix = "c3a_"
    converts = True

    c3a_kernel = Param()  # (out / b, in / b, b)
    block_size = Val()

    def build(self, c, where):
        (out, inp), b = self.layer.shape, match.pattern_value(c.block_size_pattern, self.key, c.block_size)
        if b < 1 or out % b or inp % b:
            raise ConfigError(f"C3A's block_size={b} must divide both sides of {self.key}, {out} x {inp}.")
        self.block_size = b
        self.c3a_kernel = nn.Parameter(torch.empty(out // b, inp // b, b, **where))

    def reset(self, c):
        out, inp = self.layer.shape
        if c.init_weights is True:
            self.c3a_kernel.zero_()
        elif c.init_weights == "gaussian":
            self.c3a_kernel.normal_()
        else:
            bound = math.sqrt(1 / inp) if c.init_weights == "kaiming_uniform" else math.sqrt(6 / (inp + out))
            self.c3a_kernel.uniform_(-bound, bound)

    def remakes(self):
        """One product with W' is faster than the transforms of x and of the gradient."""
        return 0.0

    def delta_weight(self):
        w = self.c3a_kernel
        rows = torch.cat([w, w], -1).unfold(-1, self.block_size, 1)[..., 1:, :].flip(-2)  # row k is w, k to the right
        return rows.transpose(1, 2).reshape(self.layer.shape) / self.layer.shape[1]


C3ALayer = layer_class("C3ALayer", C3A)
C3AModel = tuner_class("C3AModel", C3ALayer, C3A_TARGETS)
register("C3A", C3AConfig, tuner=C3AModel, prefix="c3a_")
