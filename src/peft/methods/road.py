"""RoAd, pairs of outputs rotated by θ and scaled by α: y' = R(Wx + b), R of 2 × 2 blocks (arXiv 2409.00119)."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn

from peft.config import ModulesConfig
from peft.core.adapter import Adapter, Param, Val
from peft.core.declare import layer_class, tuner_class
from peft.core.defaults import LORA_TARGETS
from peft.core.validate import check_range
from peft.enums import PeftType
from peft.errors import ConfigError
from peft.registry import register

RoadVariant = Literal["road_1", "road_2", "road_4"]
VALUES = {"road_1": 1, "road_2": 2, "road_4": 4}  # how many of the four numbers in a 2 × 2 block are free


@dataclass
class RoadConfig(ModulesConfig):
    """RoAd on linear layers. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.ROAD

    variant: RoadVariant = field(default="road_1", metadata={"help": "θ and α of a pair, of a row, or of each number"})
    group_size: int = field(default=64, metadata={"help": "outputs in a group; each is paired half a group on"})
    init_weights: bool = field(default=True, metadata={"help": "start as the base model, else at random"})

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "group_size", 2)
        if self.group_size % 2:
            raise ConfigError(f"RoadConfig.group_size must be even, got {self.group_size}: a group is made of pairs.")


class Road(Adapter):
    """Output i of a group and its partner i + group_size/2: (c·y₁ - s·y₂, s·y₁ + c·y₂), c = α cos θ, s = α sin θ."""

    prefix = "road_"
    parallel = False

    road_theta, road_alpha = Param(), Param()  # (groups, variant's values, group_size/2), flat
    variant, group_size = Val(), Val()

    def build(self, c, where):
        out = self.layer.shape[0]
        if out % c.group_size:
            raise ConfigError(
                f"RoadConfig.group_size={c.group_size} does not divide the {out} outputs of {self.key}. Choose an even "
                "divisor of all targets' outputs."
            )
        self.variant, self.group_size = c.variant, c.group_size
        count = out // 2 * VALUES[c.variant]
        self.road_theta = nn.Parameter(torch.empty(count, **where))
        self.road_alpha = nn.Parameter(torch.empty(count, **where))

    def reset(self, c):
        if c.init_weights:
            self.road_theta.zero_()
            self.road_alpha.fill_(1)
        else:
            self.road_theta.normal_(std=0.5)
            self.road_alpha.normal_(mean=1, std=0.5)

    def coefficients(self):
        """What each output, and what its partner, is multiplied with: two of (groups, 2, group_size/2)."""
        half, count = self.group_size // 2, VALUES[self.variant]
        theta, alpha = (t.view(-1, count, half) for t in (self.road_theta, self.road_alpha))
        own, other = alpha * theta.cos(), alpha * theta.sin()
        if count == 4:  # the two cosines come first, then the two sines
            own, other = own[:, :2], other[:, 2:]
        sign = torch.tensor([[-1.0], [1.0]], dtype=other.dtype, device=other.device)
        return own.expand(-1, 2, -1), other * sign

    def rotate(self, y):
        """R y for y (…, out)."""
        own, other = (t.to(y.dtype) for t in self.coefficients())
        a, b = y.unflatten(-1, own.shape).unbind(-2)
        turned = torch.addcmul(a * own[:, 0], b, other[:, 0]), torch.addcmul(b * own[:, 1], a, other[:, 1])
        return torch.stack(turned, dim=-2).view(y.shape)

    def output(self, x, y):
        return self.rotate(y)

    def merged_weight(self, W):
        return self.rotate(W.T).T

    def merged_bias(self, b, W):
        return None if b is None else self.rotate(b)


RoadLayer = layer_class("RoadLayer", Road)
RoadModel = tuner_class("RoadModel", RoadLayer, LORA_TARGETS)
register("ROAD", RoadConfig, tuner=RoadModel, prefix="road_", mixed=True)
