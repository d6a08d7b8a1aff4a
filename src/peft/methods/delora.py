"""DeLoRA, W + (λ/r)·Σᵢ bᵢaᵢᵀ/(‖bᵢ‖‖aᵢ‖)·diag‖W‖: directions, and apart from them how far to go (arXiv 2503.18225)."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn

from peft.config import TargetConfig
from peft.core import match
from peft.core.adapter import Buf, Mod, Param, Val, dropout_rate
from peft.core.declare import layer_class, tuner_class
from peft.core.defaults import LORA_TARGETS
from peft.core.validate import check_pattern, check_range
from peft.enums import PeftType
from peft.methods.factored import Factored
from peft.ops.lowrank import LowRank
from peft.registry import register

SHORTEST = 1e-4  # a shorter a or b counts as this long: at the start, b is zero


@dataclass
class DeloraConfig(TargetConfig):
    """DeLoRA on linear layers. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.DELORA

    r: int = field(default=8, metadata={"help": "number of directions"})
    delora_lambda: int | float = field(default=15, metadata={"help": "initial λ, which bounds the update; trained"})
    module_dropout: float = field(default=0.0, metadata={"help": "dropout probability on the update's input"})
    bias: Literal["none", "all", "delora_only"] = field(default="none", metadata={"help": "base biases to train"})
    init_weights: bool = field(default=True, metadata={"help": "start as the base model (B = 0), else at random"})
    rank_pattern: dict[str, int] | None = field(
        default_factory=dict, metadata={"help": "other ranks by layer name, name ending or regex"}
    )
    lambda_pattern: dict[str, int | float] | None = field(
        default_factory=dict, metadata={"help": "other delora_lambdas by layer name, name ending or regex"}
    )

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "r", 1)
        check_range(self, "delora_lambda")
        check_range(self, "module_dropout", 0, 1)
        check_pattern(self, "rank_pattern", 1)
        check_pattern(self, "lambda_pattern")


class Delora(Factored):
    """y + B diag(λ / (r‖bᵢ‖‖aᵢ‖)) A (‖w‖∘dropout(x)), with ‖w‖ the lengths of W's columns at the start."""

    prefix = "delora_"
    converts = True

    delora_dropout = Mod(trainable=False)
    delora_A, delora_B, delora_lambda = Param(), Param(), Param()  # (r, in), (out, r), (1,)
    delora_w_norm = Buf()  # (in,)
    r = Val()

    def build(self, c, where):
        out, inp = self.layer.shape
        self.r = r = match.pattern_value(c.rank_pattern, self.key, c.r)
        if c.module_dropout:
            self.delora_dropout = nn.Dropout(c.module_dropout)
        self.delora_A = nn.Parameter(torch.empty(r, inp, **where))
        self.delora_B = nn.Parameter(torch.empty(out, r, **where))
        self.delora_lambda = nn.Parameter(torch.empty(1, **where))
        self.delora_w_norm = torch.empty(inp, **where)

    def reset(self, c):
        nn.init.kaiming_uniform_(self.delora_A, a=math.sqrt(5))
        self.delora_B.zero_() if c.init_weights else nn.init.kaiming_uniform_(self.delora_B, a=math.sqrt(5))
        self.delora_lambda.fill_(match.pattern_value(c.lambda_pattern, self.key, c.delora_lambda))
        self.delora_w_norm.copy_(lengths(self.base_weight(), 0))

    def factors(self):
        """(A, B) with all that scales them: they are small, the activations are not."""
        A, B = self.delora_A, self.delora_B
        scale = self.delora_lambda / (self.r * lengths(A, 1).clamp(min=SHORTEST) * lengths(B, 0).clamp(min=SHORTEST))
        return A * self.delora_w_norm, B * scale.to(B.dtype)

    def low_rank(self):
        return LowRank(*self.factors(), 1.0, dropout_rate(self.delora_dropout))


def lengths(M, dim):
    """Of the rows (dim=1) or columns (dim=0) of a matrix, in float32 or better."""
    return torch.linalg.vector_norm(M, dim=dim, dtype=torch.promote_types(M.dtype, torch.float32))


DeloraLayer = layer_class("DeloraLayer", Delora)
DeloraModel = tuner_class("DeloraModel", DeloraLayer, LORA_TARGETS)
register("DELORA", DeloraConfig, tuner=DeloraModel, prefix="delora_")
