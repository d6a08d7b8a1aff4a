"""HiRA, W + W∘(BA): a low-rank matrix scales the base weight entry by entry (openreview.net/forum?id=TwJrTz9cRS)."""

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import nn

from peft.config import TargetConfig
from peft.core import match
from peft.core.adapter import Adapter, Mod, Param, Val, dropout_rate, through
from peft.core.declare import layer_class, tuner_class
from peft.core.defaults import LORA_TARGETS
from peft.core.validate import check_pattern, check_range
from peft.enums import PeftType
from peft.errors import ConfigError
from peft.registry import register


@dataclass
class HiraConfig(TargetConfig):
    """HiRA on linear layers, embeddings and convolutions. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.HIRA

    r: int = field(default=32, metadata={"help": "rank of BA; the update itself has any rank"})
    hira_dropout: float = field(default=0.0, metadata={"help": "dropout probability on the update's input"})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "the base stores (in, out), as Conv1D does"})
    init_weights: bool | Literal["gaussian"] | None = field(
        default=True, metadata={"help": "start as the base model (B = 0; 'gaussian': A is normal / r), else at random"}
    )
    rank_pattern: dict[str, int] | None = field(
        default_factory=dict, metadata={"help": "other ranks by layer name, name ending or regex"}
    )

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "r", 1)
        check_range(self, "hira_dropout", 0, 1)
        check_pattern(self, "rank_pattern", 1)


class Hira(Adapter):
    """y + (W∘BA) dropout(x)."""

    prefix = "hira_"
    kinds = ("linear", "conv", "embedding")

    hira_dropout = Mod(trainable=False)
    hira_A, hira_B = Param(), Param()  # (r, in, *kernel), (out, r, *ones)
    hira_embedding_A, hira_embedding_B = Param(), Param()  # (r, vocabulary), (dim, r)
    r = Val()

    def build(self, c, where):
        self.r = r = match.pattern_value(c.rank_pattern, self.key, c.r)
        if getattr(self.base, "groups", 1) > 1:
            raise ConfigError(
                f"{self.key} is a convolution with groups, which HiRA has no low-rank form for. List it in "
                "exclude_modules."
            )
        if c.hira_dropout:
            self.hira_dropout = nn.Dropout(c.hira_dropout)
        out, inp, *kernel = self.layer.shape
        A = nn.Parameter(torch.empty(r, inp, *kernel, **where))
        B = nn.Parameter(torch.empty(out, r, *[1] * len(kernel), **where))
        if self.kind.name == "embedding":
            self.hira_embedding_A, self.hira_embedding_B = A, B
        else:
            self.hira_A, self.hira_B = A, B

    def reset(self, c):
        A, B = self.factors()
        if self.kind.name == "embedding" and c.init_weights is not False:
            A.zero_()
            B.normal_()
        elif not c.init_weights:
            A.normal_()
            B.normal_()
        else:
            B.zero_()
            if c.init_weights == "gaussian" and self.kind.name == "linear":
                A.normal_(std=1 / self.r)
            else:
                nn.init.kaiming_uniform_(A, a=math.sqrt(5))

    @classmethod
    def from_file(cls, c, tensors, adapters):
        """Upstream does not read rank_pattern, so its files have rank r everywhere: such a file is taken as it is."""
        ranks = {k.removeprefix("base_model.model."): len(t) for k, t in tensors.items() if k.endswith("_A")}
        for a in adapters:
            A = a.factors()[0]
            field_name = "hira_embedding_A" if a.kind.name == "embedding" else "hira_A"
            if ranks.get(f"{a.key}.{field_name}") == c.r != a.r:
                a.build(replace(c, rank_pattern={}), {"device": A.device, "dtype": A.dtype})
                a.set_trainable(a.trainable)
        return tensors

    def factors(self):
        return (self.hira_A, self.hira_B) if self.hira_A is not None else (self.hira_embedding_A, self.hira_embedding_B)

    def product(self, dtype):
        """BA, in W's shape."""
        A, B = self.factors()
        return self.kind.factor_delta(A.to(dtype), B.to(dtype))

    def remakes(self):
        return dropout_rate(self.hira_dropout)

    def output(self, x, y):
        A, B = self.factors()
        W = self.base_weight()
        if self.kind.name == "embedding":  # the rows that x asks for; dropout is for real numbers
            rows = self.layer.op(x, W)
            return y + rows * (self.kind.lookup(self.base, x, A.t()) @ B.t())
        h = self.cast(through(self.hira_dropout, x), A.dtype)
        return y + self.layer.op(h, self.delta(W).to(h.dtype))

    def delta(self, W):
        return W * self.product(torch.promote_types(W.dtype, self.factors()[0].dtype))

    def merged_weight(self, W):
        return torch.addcmul(W, W, self.product(W.dtype))


HiraLayer = layer_class("HiraLayer", Hira)
HiraModel = tuner_class("HiraModel", HiraLayer, LORA_TARGETS)
register("HIRA", HiraConfig, tuner=HiraModel, prefix="hira_", mixed=True)
