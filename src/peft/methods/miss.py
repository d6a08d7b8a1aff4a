"""MiSS: every r-th column of W gets the same trained column added (arXiv 2409.15371)."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn

from peft.config import TargetConfig
from peft.core.adapter import Adapter, Mod, Param, Val, through
from peft.core.defaults import LORA_TARGETS
from peft.core.layer import AdapterLayer
from peft.core.tuner import Tuner
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
    bias: Literal["none", "all", "MiSS_only"] = field(default="none", metadata={"help": "base biases to train"})

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "r", 1)
        check_range(self, "mini_r", 1)
        check_range(self, "miss_dropout", 0, 1)


class Miss(Adapter):
    """y + blockᵀ·(sum of the slices of x, each r long). 'bat': r × r tiles W_io become W_io + W_io·B_o + B_o."""

    prefix = "miss_"

    miss_dropout = Mod(trainable=False)
    miss_block = Param()  # (r, out); 'mini': (r, mini_r); 'bat': (out / r, r, r)
    miss_r, miss_mini_r, variant = Val(), Val(), Val()

    def build(self, c, where):
        out, inp = self.layer.shape
        if c.r > inp:
            raise ConfigError(f"MissConfig.r={c.r} is more than {self.key} has inputs: {inp}.")
        if c.init_weights == "bat" and (out % c.r or inp % c.r):
            raise ConfigError(
                f"init_weights='bat' cuts {self.key}, {out} x {inp}, into tiles of r={c.r}: choose a divisor."
            )
        if c.init_weights == "mini" and out % c.mini_r:
            raise ConfigError(f"MissConfig.mini_r={c.mini_r} does not divide the {out} outputs of {self.key}.")
        self.miss_r, self.miss_mini_r, self.variant = c.r, c.mini_r, c.init_weights
        if c.miss_dropout:
            self.miss_dropout = nn.Dropout(c.miss_dropout)
        shape = {"bat": (out // c.r, c.r, c.r), "mini": (c.r, c.mini_r)}.get(c.init_weights, (c.r, out))
        self.miss_block = nn.Parameter(torch.empty(shape, **where))

    def reset(self, c):
        if c.init_weights is False:
            bound = self.miss_block.shape[1] ** -0.5
            self.miss_block.uniform_(-bound, bound)
        else:
            self.miss_block.zero_()

    def remakes(self):
        """'bat' changes every tile by itself, so W' is made: there is no cheaper way through it.

        Two such adapters each act on W; in upstream the second one acts on what the first made of it.
        """
        return 0.0 if self.variant == "bat" else None

    def columns(self):
        """(r, out), what is added to every r-th column."""
        block = self.miss_block
        return block.repeat(1, self.layer.shape[0] // self.miss_mini_r) if self.variant == "mini" else block

    def output(self, x, y):
        if self.variant == "bat":
            return y + self.layer.op(x, self.delta(self.base_weight().to(self.miss_block.dtype)).to(x.dtype))
        columns = self.columns()
        h = through(self.miss_dropout, self.cast(x, columns.dtype))
        if missing := -h.shape[-1] % self.miss_r:
            h = F.pad(h, (0, missing))
        return y + (h.unflatten(-1, (-1, self.miss_r)).sum(-2) @ columns.to(h.dtype)).to(y.dtype)

    def delta(self, W):
        out, inp = W.shape
        if self.variant != "bat":
            return self.columns().to(W.dtype).repeat(-(-inp // self.miss_r), 1)[:inp].T
        r, B = self.miss_r, self.miss_block.to(W.dtype)
        turned = torch.bmm(W.reshape(out // r, -1, r), B).view(out // r, r, inp // r, r)  # W_io·B_o of all tiles
        return (turned + B[:, :, None]).view(out, inp)

    def merged_weight(self, W):
        return W + self.delta(W)


class MissLayer(AdapterLayer):
    """A base layer with MiSS adapters."""

    adapter_cls = Miss

    def supports_lora_conversion(self, adapter_name="default"):
        return True


class MissModel(Tuner):
    """A model with MiSS adapters."""

    layer_cls = MissLayer
    target_module_mapping = LORA_TARGETS


register("MISS", MissConfig, tuner=MissModel, prefix="miss_")
