"""DEFT, W + Q(s·R - PᵀW): a rank-r part of the weight is taken out and another put in (Kumar et al., NeurIPS 2025).

With para=True nothing is put in (PaRa, arXiv 2406.05641).
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn

from peft.config import TargetConfig
from peft.core.adapter import Adapter, Mod, Param, Val, through
from peft.core.declare import layer_class, tuner_class
from peft.core.defaults import LORA_TARGETS
from peft.core.validate import check_range
from peft.enums import PeftType
from peft.ops import lowrank
from peft.ops.lowrank import LowRank
from peft.registry import register


@dataclass
class DeftConfig(TargetConfig):
    """DEFT on linear layers. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.DEFT

    r: int = field(default=8, metadata={"help": "rank of what is replaced, at most the layer's outputs"})
    decomposition_method: Literal["relu", "qr"] = field(
        default="relu", metadata={"help": "'relu': Q = P, and relu(P) reads W; 'qr': both are P made orthonormal"}
    )
    init_scale: float = field(default=1.0, metadata={"help": "with init_weights=False, R is normal with 0.02 of this"})
    alpha: int | float | None = field(default=None, metadata={"help": "R is scaled by alpha / r; None: it is not"})
    para: bool = field(default=False, metadata={"help": "take a part of the weight out only; there is no R"})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "the base stores (in, out), as Conv1D does"})
    deft_dropout: float = field(default=0.0, metadata={"help": "dropout probability on the input of R"})
    init_weights: bool = field(
        default=True, metadata={"help": "start as the base model (s·R = PᵀW), else with a random R"}
    )
    bias: Literal["none", "all", "deft_only"] = field(default="none", metadata={"help": "base biases to train"})

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "r", 1)
        check_range(self, "init_scale")
        check_range(self, "deft_dropout", 0, 1)


class Deft(Adapter):
    """y + Q(s·R dropout(x) - Pᵀ W x)."""

    prefix = "deft_"

    deft_P, deft_R = Param(), Param()  # (out, r), (r, in)
    deft_dropout = Mod(trainable=False)
    r, scaling_R, decomposition = Val(), Val(), Val()

    def build(self, c, where):
        out, inp = self.layer.shape
        self.r = r = min(c.r, out)
        self.scaling_R = c.alpha / r if c.alpha else 1.0
        self.decomposition = c.decomposition_method
        self.deft_P = nn.Parameter(torch.empty(out, r, **where))
        if not c.para:
            self.deft_R = nn.Parameter(torch.empty(r, inp, **where))
        if c.deft_dropout:
            self.deft_dropout = nn.Dropout(c.deft_dropout)

    def reset(self, c):
        self.deft_P.normal_(std=0.02)
        if self.deft_R is None:
            return
        if c.init_weights:
            self.deft_R.copy_(self.taken(self.base_weight().float()) / self.scaling_R)
        else:
            self.deft_R.normal_(std=0.02 * abs(c.init_scale))

    def bases(self, dtype):
        """(Q that writes, P that reads), both (out, r). QR needs more than half precision."""
        P = self.deft_P.to(dtype)
        if self.decomposition == "relu":
            return P, torch.relu(P)
        Q = torch.linalg.qr(P.to(torch.promote_types(dtype, torch.float32)))[0].to(dtype)
        return Q, Q

    def taken(self, W):
        """PᵀW, (r, in)."""
        return self.bases(W.dtype)[1].t() @ W

    def net(self, W):
        """What Q writes, s·R - PᵀW, (r, in)."""
        taken = self.taken(W)
        return -taken if self.deft_R is None else self.scaling_R * self.deft_R.to(W.dtype) - taken

    def low_rank(self):
        """PᵀW is made once for all rows of x; without gradients, to go through W x is cheaper and needs no W."""
        drop = self.deft_dropout
        if not torch.is_grad_enabled() or (drop is not None and drop.training):
            return None
        W = self.base_weight()
        return LowRank(self.net(W if W.dtype.itemsize >= 4 else W.float()), self.bases(self.deft_P.dtype)[0], 1.0)

    def output(self, x, y):
        """y is W x + b."""
        dtype = self.deft_P.dtype if lowrank.is_exact() else y.dtype
        Q, P = self.bases(dtype)
        bias = getattr(self.base, "bias", None)
        h = -F.linear(y.to(dtype) if bias is None else y.to(dtype) - bias.to(dtype), P.t())
        if self.deft_R is not None:
            h = h + F.linear(through(self.deft_dropout, x).to(dtype), self.scaling_R * self.deft_R.to(dtype))
        return y + F.linear(h, Q)

    def delta(self, W):
        return self.bases(W.dtype)[0] @ self.net(W)

    def merged_weight(self, W):
        return W + self.delta(W)


DeftLayer = layer_class("DeftLayer", Deft)
DeftModel = tuner_class("DeftModel", DeftLayer, LORA_TARGETS)
register("DEFT", DeftConfig, tuner=DeftModel, prefix="deft_")
