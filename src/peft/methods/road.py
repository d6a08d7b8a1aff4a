"""RoAd: pairs of outputs rotated and scaled by trained angles and lengths (arXiv 2409.00119)."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn

from peft.config import ModulesConfig
from peft.core.adapter import Adapter, Param, Val
from peft.core.defaults import LORA_TARGETS
from peft.core.layer import AdapterLayer
from peft.core.tuner import Tuner
from peft.enums import PeftType
from peft.errors import ConfigError
from peft.registry import register


@dataclass
class RoadConfig(ModulesConfig):
    """RoAd on linear layers. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.ROAD

    variant: str | Literal["road_1", "road_2", "road_4"] = field(
        default="road_1",
        metadata={"help": "numbers for a pair: road_1 one angle and length; road_2 two of each; road_4 four"},
    )
    group_size: int = field(default=64, metadata={"help": "output i is paired with i + group_size / 2 of its group"})
    init_weights: bool = field(default=True, metadata={"help": "start as the base model, else at random"})

    def __post_init__(self):
        super().__post_init__()
        if self.variant not in SIZE:
            raise ConfigError(f"RoadConfig.variant must be one of {', '.join(SIZE)}, got {self.variant!r}.")
        if self.group_size <= 0 or self.group_size % 2:
            raise ConfigError(f"RoadConfig.group_size must be even and positive, got {self.group_size}.")


SIZE = {"road_1": 0.5, "road_2": 1, "road_4": 2}  # numbers for each output


class Road(Adapter):
    """(y1, y2) -> (c1·y1 − s1·y2, c2·y2 + s2·y1), c = α·cos θ and s = α·sin θ, for each pair of outputs."""

    prefix = "road_"
    parallel = False

    road_theta, road_alpha = Param(), Param()  # (out / 2,), (out,) or (2 * out,)
    variant, group_size = Val(), Val()

    def build(self, c, where):
        out = self.layer.shape[0]
        if out % c.group_size:
            raise ConfigError(f"RoadConfig.group_size={c.group_size} does not divide the {out} outputs of {self.key}.")
        self.variant, self.group_size = c.variant, c.group_size
        size = int(out * SIZE[c.variant])
        self.road_theta, self.road_alpha = (nn.Parameter(torch.empty(size, **where)) for _ in range(2))

    def reset(self, c):
        if c.init_weights:
            self.road_theta.zero_()
            self.road_alpha.fill_(1)
        else:
            self.road_theta.normal_(0, 0.5)
            self.road_alpha.normal_(1, 0.5)

    def coefficients(self):
        """(c, s), both (groups, 2 or 1, group_size / 2)."""
        half = self.group_size // 2
        if self.variant == "road_4":
            theta, alpha = (t.view(-1, 2, 2, half) for t in (self.road_theta, self.road_alpha))
            return alpha[:, 0] * theta[:, 0].cos(), alpha[:, 1] * theta[:, 1].sin()
        halves = 1 if self.variant == "road_1" else 2
        theta, alpha = (t.view(-1, halves, half) for t in (self.road_theta, self.road_alpha))
        return alpha * theta.cos(), alpha * theta.sin()

    def turned(self, y):
        """y (..., out), turned."""
        c, s = self.coefficients()
        pairs = self.cast(y, c.dtype).unflatten(-1, (-1, 2, self.group_size // 2))
        c, s = (t.to(pairs.dtype).expand(-1, 2, -1) for t in (c, s))
        turn = turned if torch.compiler.is_compiling() or not torch.is_grad_enabled() else Turn.apply
        return turn(pairs, c, s).flatten(-3)

    def output(self, x, y):
        return self.turned(y).to(y.dtype)

    def merged_weight(self, W):
        return self.turned(W.T).T.to(W.dtype)

    def merged_bias(self, b, W):
        return b if b is None else self.turned(b).to(b.dtype)


def turned(y, c, s):
    """y (..., groups, 2, half) turned by c and s (groups, 2, half)."""
    out = y * c
    out[..., 0, :].addcmul_(y[..., 1, :], s[:, 0], value=-1)
    out[..., 1, :].addcmul_(y[..., 0, :], s[:, 1])
    return out


class Turn(torch.autograd.Function):
    """`turned`, keeping y alone for the backward pass."""

    @staticmethod
    def forward(ctx, y, c, s):
        ctx.save_for_backward(y, c, s)
        return turned(y, c, s)

    @staticmethod
    def backward(ctx, g):
        y, c, s = ctx.saved_tensors
        back = torch.stack([-s[:, 1], -s[:, 0]], 1)  # the transpose: the two sines change places and signs
        dims = tuple(range(g.ndim - 3))
        swapped = (g * y.flip(-2)).sum(dims)
        return turned(g, c, back), (g * y).sum(dims), torch.stack([-swapped[:, 0], swapped[:, 1]], 1)


class RoadLayer(AdapterLayer):
    """A base layer with RoAd adapters."""

    adapter_cls = Road


class RoadModel(Tuner):
    """A model with RoAd adapters."""

    layer_cls = RoadLayer
    target_module_mapping = LORA_TARGETS


register("ROAD", RoadConfig, tuner=RoadModel, prefix="road_", mixed=True)
