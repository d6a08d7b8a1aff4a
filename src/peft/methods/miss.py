"""MiSS: every r-th column of W gets the same trained column added (arXiv 2409.15371)."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn

from peft.config import TargetConfig
from peft.core.adapter import Additive, Mod, Param, Val, dropout_rate, through
from peft.core.declare import layer_class, tuner_class
from peft.core.defaults import LORA_TARGETS
from peft.core.validate import check_range
from peft.enums import PeftType
from peft.errors import ConfigError
from peft.registry import register


@dataclass
class MissConfig(TargetConfig):
    """MiSS on linear layers. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.MISS

    r: int = field(default=64, metadata={"help": "number of trained columns"})
    miss_dropout: float = field(default=0.0, metadata={"help": "dropout probability on the input"})
    mini_r: int = field(default=1, metadata={"help": "with 'mini': length of a column, repeated to fill it"})
    init_weights: bool | Literal["bat", "mini"] = field(
        default=True,
        metadata={
            "help": "True: start as the base model; False: at random; 'mini' and 'bat' are variants of the method"
        },
    )
    bias: Literal["none", "all", "miss_only", "MiSS_only"] = field(
        default="none", metadata={"help": "base biases to train"}
    )

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "r", 1)
        check_range(self, "mini_r", 1)
        check_range(self, "miss_dropout", 0, 1)


class Miss(Additive):
    """y + blockᵀ·(sum of the slices of x, each r long)."""

    prefix = "miss_"
    converts = True

    miss_dropout = Mod(trainable=False)
    miss_block = Param()  # (r, out); 'mini': (r, mini_r), repeated to fill out; 'bat': (out / r, r, r)
    miss_r, miss_mini_r = Val(), Val()

    @classmethod
    def of(cls, c, key):
        return Bat if c.init_weights == "bat" else cls

    def build(self, c, where):
        if c.r > self.layer.shape[1]:
            raise ConfigError(f"MissConfig.r={c.r} is more than {self.key} has inputs: {self.layer.shape[1]}.")
        self.miss_r, self.miss_mini_r = c.r, c.mini_r
        if c.miss_dropout:
            self.miss_dropout = nn.Dropout(c.miss_dropout)
        self.miss_block = nn.Parameter(torch.empty(self.block_shape(c), **where))

    def block_shape(self, c):
        out = self.layer.shape[0]
        if c.init_weights != "mini":
            return c.r, out
        if out % c.mini_r:
            raise ConfigError(f"MissConfig.mini_r={c.mini_r} does not divide the {out} outputs of {self.key}.")
        return c.r, c.mini_r

    def reset(self, c):
        if c.init_weights is False:
            bound = self.miss_block.shape[1] ** -0.5
            self.miss_block.uniform_(-bound, bound)
        else:
            self.miss_block.zero_()

    def output(self, x, y):
        h = through(self.miss_dropout, x).reshape(-1, x.shape[-1])
        if missing := -h.shape[-1] % self.miss_r:
            h = F.pad(h, (0, missing))
        h, block = h.unflatten(-1, (-1, self.miss_r)).sum(-2), self.miss_block.to(x.dtype)
        out, width = y.shape[-1], block.shape[1]
        if width == out:
            return torch.addmm(y.reshape(-1, out), h, block).view(y.shape)
        return (y.reshape(-1, out // width, width) + (h @ block).unsqueeze(1)).view(y.shape)

    def beside(self, x, y, y0):
        return self.output(x, y)

    def delta_weight(self):
        out, inp = self.layer.shape
        block = self.miss_block
        return block.repeat(-(-inp // self.miss_r), out // block.shape[1])[:inp].T


class Bat(Miss):
    """'bat': each r × r tile W_io becomes W_io + W_io·B_o + B_o. As all tiles change, W' is formed."""

    parallel = False

    def block_shape(self, c):
        out, inp = self.layer.shape
        if out % c.r or inp % c.r:
            raise ConfigError(
                f"init_weights='bat' cuts {self.key}, {out} x {inp}, into tiles of r={c.r}: choose a divisor."
            )
        return out // c.r, c.r, c.r

    def remakes(self):
        return dropout_rate(self.miss_dropout)  # upstream makes it and never applies it

    def output(self, x, y):
        return self.changed(x, y, self.base_weight())

    def beside(self, x, y, y0):
        return self.changed(x, y, self.layer.weight_before(self))

    def changed(self, x, y, W):
        """y and what the change of W makes of x."""
        update = self.layer.op(through(self.miss_dropout, x), self.delta(W.to(self.miss_block.dtype)).to(x.dtype))
        return y + update.to(y.dtype)

    def delta(self, W):
        rows, B = self.rows(W)
        return self.tiled(torch.bmm(rows, B), B, W.shape)

    def merged_weight(self, W):
        rows, B = self.rows(W)
        return self.tiled(torch.baddbmm(rows, rows, B), B, W.shape)

    def rows(self, W):
        """The rows of all tiles in a row of tiles, (out / r, in, r), and the blocks B_o."""
        return W.reshape(W.shape[0] // self.miss_r, -1, self.miss_r), self.miss_block.to(W.dtype)

    def tiled(self, rows, B, shape):
        r = self.miss_r
        return rows.view(-1, r, shape[1] // r, r).add_(B[:, :, None]).view(shape)


MissLayer = layer_class("MissLayer", Miss)
MissModel = tuner_class("MissModel", MissLayer, LORA_TARGETS)
register("MISS", MissConfig, tuner=MissModel, prefix="miss_")
