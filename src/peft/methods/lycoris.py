"""What LoHa and LoKr have in common: ranks and alphas by layer, and dropout of rows of the update, or of all of it."""

from dataclasses import dataclass, field

import torch
from torch import nn

from peft.config import TargetConfig
from peft.core import match
from peft.core.adapter import Additive, Val
from peft.core.layer import AdapterLayer
from peft.core.validate import check_pattern, check_range

MAX_RANK = 1 << 30  # far beyond any use: what a damaged or hostile file may ask for


@dataclass
class LycorisConfig(TargetConfig):
    """The settings of both."""

    r: int = field(default=8, metadata={"help": "rank of each pair of factors"})
    alpha: int | float = field(default=8, metadata={"help": "the update is scaled by alpha / r"})
    rank_dropout: float = field(default=0.0, metadata={"help": "probability of dropping a row of the update"})
    module_dropout: float = field(default=0.0, metadata={"help": "probability of dropping a layer's whole update"})
    use_effective_conv2d: bool = field(
        default=False, metadata={"help": "factorise the kernels of convolutions too (arXiv 2108.06098, proposition 3)"}
    )
    rank_pattern: dict[str, int] | None = field(
        default_factory=dict, metadata={"help": "other ranks by layer name, name ending or regex"}
    )
    alpha_pattern: dict[str, int | float] | None = field(
        default_factory=dict, metadata={"help": "other alphas by layer name, name ending or regex"}
    )

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "r", 1, MAX_RANK)
        check_range(self, "alpha")
        check_range(self, "rank_dropout", 0, 1)
        check_range(self, "module_dropout", 0, 1)
        check_pattern(self, "rank_pattern", 1, MAX_RANK)


class Lycoris(Additive):
    """An update whose factors are bare parameters, and whose rows may be dropped."""

    kinds = ("linear", "conv")
    converts = True

    r, alpha, scaling = Val(), Val(), Val()
    rank_dropout, module_dropout = Val(), Val()

    rescales = True  # rows that stay make up for those that are dropped

    def read(self, c):
        """Take over the settings that a config has for this layer."""
        self.r = match.pattern_value(c.rank_pattern, self.key, c.r)
        self.alpha = match.pattern_value(c.alpha_pattern, self.key, c.alpha)
        self.scaling = float(self.alpha / self.r)
        self.rank_dropout, self.module_dropout = c.rank_dropout, c.module_dropout

    @property
    def drops(self):
        return self.training and bool(self.rank_dropout or self.module_dropout)

    def native_scaling(self):
        return self.alpha / self.r

    def kept(self, like):
        """What this forward multiplies each row of the update with, (out,), or None: nothing is dropped.

        A factor of zeros, not a skipped computation: nothing waits for the device, and every parameter has a gradient.
        """
        if not self.drops:
            return None
        keep = torch.ones(self.layer.shape[0], device=like.device, dtype=like.dtype)
        if self.rank_dropout:
            keep = (torch.rand_like(keep) > self.rank_dropout).to(like.dtype)
            if self.rescales:
                keep = keep / keep.mean().clamp(min=1 / len(keep))  # all may be dropped
        if self.module_dropout:
            keep = keep * (torch.rand(1, device=like.device) > self.module_dropout)
        return keep

    def acting_delta(self):
        delta = self.delta_weight()
        keep = self.kept(delta)
        return delta if keep is None else delta * keep.view(-1, *[1] * (delta.ndim - 1))


class LycorisLayer(AdapterLayer):
    """A base layer with such adapters."""


def parameter(*shape, **where):
    """An uninitialised parameter. `where`: device and dtype."""
    return nn.Parameter(torch.empty(shape, **where))


def initialise(t):
    """Uniform in ±1 / √fan_in, as nn.Linear starts."""
    nn.init.kaiming_uniform_(t, a=5**0.5)


def with_kernel(t, b):
    """The part of a factorised kernel that reads the input: t (r, r, *kernel), b (r, in) -> (r, in · kernel)."""
    return torch.einsum("ijk,jp->ipk", t.flatten(2), b).flatten(1)
