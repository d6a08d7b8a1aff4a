"""SHiRA, W + S: a few entries of W, chosen once, are trained and the others stay (arXiv 2406.13175)."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn

from peft.config import ModulesConfig
from peft.core.adapter import Additive, Buf, Param, Val
from peft.core.declare import layer_class, tuner_class
from peft.core.defaults import SHIRA_TARGETS
from peft.core.validate import check_range
from peft.enums import PeftType
from peft.errors import ConfigError
from peft.ops import entries
from peft.registry import register


def random_mask(base_layer, r, random_seed=None, **kwargs):
    """A mask of the base weight's shape with r·(in + out) ones, the same for a seed (None: a fixed one)."""
    W = base_layer.weight
    generator = torch.Generator()  # on the CPU, and never seeded by the program: so upstream's values come out
    if random_seed is not None:
        generator.manual_seed(random_seed)
    mask = torch.zeros(W.numel(), dtype=torch.bool)
    mask[torch.randperm(W.numel(), generator=generator)[: r * sum(W.shape)]] = True
    return mask.view(W.shape).to(W.device)


@dataclass
class ShiraConfig(ModulesConfig):
    """SHiRA on linear layers. Wrong values raise ConfigError, naming the field.

    Set `mask_fn` on the config to choose the entries: `mask_fn(base_layer, r, random_seed=...)` returns a mask of the
    shape of `base_layer.weight` with r·(in + out) ones. No file holds it; files hold the entries that it chose.
    """

    METHOD: ClassVar = PeftType.SHIRA

    r: int = field(default=32, metadata={"help": "r·(in + out) entries are trained, as many numbers as LoRA of rank r"})
    mask_type: Literal["random"] = field(default="random", metadata={"help": "how the entries are chosen"})
    random_seed: int | None = field(default=None, metadata={"help": "seed of the random choice"})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "the base stores (in, out), as Conv1D does"})
    init_weights: bool = field(default=True, metadata={"help": "start as the base model (zeros), else at random"})

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "r", 1)
        self.mask_fn = random_mask


class Shira(Additive):
    """y + s·S x, with S zero but for the entries."""

    prefix = "shira_"
    rounds = True  # like any weight that is trained itself

    shira_weight = Param()  # (entries,)
    shira_indices = Buf()  # (2, entries), int32: row and column of each, in row order
    r, scaling = Val(), Val()

    def build(self, c, where):
        self.correct_layout(c)
        out, inp = self.layer.shape
        self.r, self.scaling = c.r, 1.0
        count = c.r * (out + inp)
        if count > out * inp:
            raise ConfigError(
                f"ShiraConfig.r={c.r} asks for {count} entries of {self.key}, which has {out * inp}. Lower r, or take "
                "the layer out of target_modules."
            )
        self.bags = entries.Bags()
        self.shira_weight = nn.Parameter(torch.empty(count, **where))
        self.shira_indices = torch.empty(2, count, **{**where, "dtype": torch.int32})

    def reset(self, c):
        if c.init_weights:
            self.shira_weight.zero_()
        else:
            self.shira_weight.normal_()
        base = self.layer.readable_base()
        mask, W = c.mask_fn(base, c.r, random_seed=c.random_seed), base.weight
        if mask.shape != W.shape or int(mask.count_nonzero()) != len(self.shira_weight):
            raise ConfigError(
                f"ShiraConfig.mask_fn must return a mask of shape {tuple(W.shape)} with {len(self.shira_weight)} ones "
                f"for {self.key}, got shape {tuple(mask.shape)} with {int(mask.count_nonzero())}."
            )
        self.shira_indices.copy_(self.kind.canon(mask).nonzero().t())

    @classmethod
    def from_file(cls, c, tensors, adapters):
        return entries.checked(tensors, ".shira_indices", {a.key: a.layer.shape for a in adapters})

    def native_scaling(self):
        return 1.0

    @property
    def values(self):
        return self.shira_weight * self.scaling

    def remakes(self):
        return 0.0

    def output(self, x, y):
        return (y + entries.output(x, self.layer.shape, self.shira_indices, self.values, self.bags)).to(y.dtype)

    def beside(self, x, y, y0):
        return self.output(x, y)

    def delta_weight(self):
        return entries.dense(self.layer.shape, self.shira_indices, self.values)

    def merged_weight(self, W):
        return entries.put(W, self.shira_indices, self.values)


ShiraLayer = layer_class("ShiraLayer", Shira)
ShiraModel = tuner_class("ShiraModel", ShiraLayer, SHIRA_TARGETS)
register("SHIRA", ShiraConfig, tuner=ShiraModel, prefix="shira_", mixed=True)
