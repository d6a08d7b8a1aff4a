"""DeLoRA: a sum of r rank-one updates of unit length, times a trained λ and the columns' norms (arXiv 2503.18225)."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn

from peft.config import TargetConfig
from peft.core import match
from peft.core.adapter import Additive, Buf, Mod, Param, Val
from peft.core.defaults import LORA_TARGETS
from peft.core.layer import AdapterLayer
from peft.core.tuner import Tuner
from peft.core.validate import check_range
from peft.enums import PeftType
from peft.errors import ConfigError
from peft.ops import lowrank
from peft.ops.lowrank import LowRank
from peft.registry import register

SHORTEST = 1e-4  # a row of A or column of B counts as at least this long


@dataclass
class DeloraConfig(TargetConfig):
    """DeLoRA on linear layers. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.DELORA

    r: int = field(default=8, metadata={"help": "number of rank-one updates"})
    delora_lambda: int | float = field(default=15, metadata={"help": "initial λ: how far W may be moved"})
    module_dropout: float = field(default=0.0, metadata={"help": "dropout probability on the input of A"})
    bias: Literal["none", "all", "delora_only"] = field(default="none", metadata={"help": "base biases to train"})
    init_weights: bool = field(default=True, metadata={"help": "start as the base model (B = 0), else at random"})
    rank_pattern: dict[str, int] | None = field(
        default_factory=dict, metadata={"help": "other ranks by layer name, name ending or regex"}
    )
    lambda_pattern: dict[str, int | float] | None = field(
        default_factory=dict, metadata={"help": "other initial λ by layer name, name ending or regex"}
    )

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "r", 1)
        check_range(self, "module_dropout", 0, 1)
        for key, r in (self.rank_pattern or {}).items():
            if r < 1:
                raise ConfigError(f"DeloraConfig.rank_pattern[{key!r}] must be at least 1, got {r}.")


class Delora(Additive):
    """y + B·diag(λ / (r·‖aᵢ‖·‖bᵢ‖))·A·(‖wⱼ‖∘x), aᵢ rows of A, bᵢ columns of B, wⱼ columns of W."""

    prefix = "delora_"

    delora_dropout = Mod(trainable=False)
    delora_A, delora_B, delora_lambda = Param(), Param(), Param()  # (r, in), (out, r), (1,)
    delora_w_norm = Buf()  # (in,): the norms of W's columns when the adapter was made
    r = Val()

    def build(self, c, where):
        out, inp = self.layer.shape
        self.r = r = match.pattern_value(c.rank_pattern, self.key, c.r)
        if c.module_dropout:
            self.delora_dropout = nn.Dropout(c.module_dropout)
        self.delora_A = nn.Parameter(torch.empty(r, inp, **where))
        self.delora_B = nn.Parameter(torch.empty(out, r, **where))
        self.delora_lambda = nn.Parameter(torch.empty(1, **where))
        self.delora_w_norm = torch.empty(inp, device=where["device"], dtype=self.base.weight.dtype)

    def reset(self, c):
        for t, zero in ((self.delora_A, False), (self.delora_B, c.init_weights)):
            bound = 1 / math.sqrt(t.shape[1])
            t.zero_() if zero else t.uniform_(-bound, bound)
        self.delora_lambda.fill_(match.pattern_value(c.lambda_pattern, self.key, c.delora_lambda))
        self.delora_w_norm.copy_(self.base_weight().norm(dim=0))

    def low_rank(self):
        A, B, drop = self.delora_A, self.delora_B, self.delora_dropout
        lengths = A.norm(dim=1).clamp(min=SHORTEST) * B.norm(dim=0).clamp(min=SHORTEST)
        scale = self.delora_lambda / self.r / lengths
        A = A * scale[:, None] * self.delora_w_norm.to(A.dtype)
        return LowRank(A, B, 1.0, drop.p if drop is not None and drop.training else 0.0)

    def output(self, x, y):
        return lowrank.add(self.base, y, x, self.low_rank())

    def delta_weight(self):
        f = self.low_rank()
        return f.B @ f.A


class DeloraLayer(AdapterLayer):
    """A base layer with DeLoRA adapters."""

    adapter_cls = Delora

    def supports_lora_conversion(self, adapter_name="default"):
        return True


class DeloraModel(Tuner):
    """A model with DeLoRA adapters."""

    layer_cls = DeloraLayer
    target_module_mapping = LORA_TARGETS


register("DELORA", DeloraConfig, tuner=DeloraModel, prefix="delora_")
