"""GLoRA, W∘(1 + A) + B and b∘(1 + D) + E + W C: weight and bias scaled and shifted (arXiv 2306.07967)."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn

from peft.config import ModulesConfig
from peft.core.adapter import Adapter, Mod, Val
from peft.core.declare import layer_class, tuner_class
from peft.core.defaults import LORA_TARGETS
from peft.core.validate import check_range
from peft.enums import PeftType
from peft.registry import register


@dataclass
class GloraConfig(ModulesConfig):
    """GLoRA on linear layers. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.GLORA

    r: int = field(default=8, metadata={"help": "rank where A, B or C are 'lora'"})
    bias: Literal["none", "all", "glora_only"] = field(default="none", metadata={"help": "base biases to train"})
    config_A_B: Literal["lora", "vector", "constant", "none"] = field(
        default="lora", metadata={"help": "A and B: a pair of factors, one number for each output, or one for all"}
    )
    config_C: Literal["lora", "vector", "none"] = field(
        default="lora", metadata={"help": "C, where the layer has a bias: a pair of factors or a vector"}
    )
    config_D_E: Literal["vector", "constant", "none"] = field(
        default="constant", metadata={"help": "D and E, where the layer has a bias: vectors or numbers"}
    )
    init_weights: bool = field(default=True, metadata={"help": "start as the base model, else at random"})

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "r", 1)


class Path(nn.Module):
    """One of A to E: Xd·Xu, or X, or where the config leaves it out, zeros that nobody reads but files hold."""

    def __init__(self, how, shape, r, where, zeros):
        super().__init__()
        if how == "lora":
            self.Xd = nn.Parameter(torch.empty(shape[0], r, **where))
            self.Xu = nn.Parameter(torch.empty(r, shape[1], **where))
        elif how == "none":
            self.register_buffer("zeros", torch.zeros(shape, **{**where, "dtype": zeros}))
        else:
            column = (shape[0], 1) if len(shape) > 1 else shape
            self.X = nn.Parameter(torch.empty(column if how == "vector" else (1,), **where))
        self.how = how

    def reset(self, start):
        """Zero in effect, or random."""
        if self.how == "lora":
            nn.init.kaiming_uniform_(self.Xu, a=math.sqrt(5))
            self.Xd.zero_() if start else nn.init.kaiming_uniform_(self.Xd, a=math.sqrt(5))
        elif self.how == "none":
            self.zeros.zero_()
        elif start:
            self.X.zero_()
        elif self.how == "constant":
            self.X.normal_(std=0.02)
        else:
            nn.init.kaiming_uniform_(self.X if self.X.ndim > 1 else self.X[None], a=math.sqrt(5))

    def forward(self, dtype):
        """What it stands for, broadcastable; None for zeros."""
        if self.how == "none":
            return None
        return self.Xd.to(dtype) @ self.Xu.to(dtype) if self.how == "lora" else self.X.to(dtype)


class Glora(Adapter):
    """(W∘(1 + A) + B) x + b∘(1 + D) + E + W C. A layer without a bias gets none."""

    prefix = "glora_"

    glora_A, glora_B = Mod(), Mod()  # (out, in), as factors, (out, 1) or (1,)
    glora_C = Mod()  # (in, 1), perhaps as factors
    glora_D, glora_E = Mod(), Mod()  # (out,) or (1,)
    r = Val()

    def build(self, c, where):
        self.r, (out, inp) = c.r, self.layer.shape
        zeros = self.layer.placement(autocast=False)["dtype"]
        biased = self.layer.base_bias() is not None
        C, D_E = (c.config_C, c.config_D_E) if biased else ("none", "none")
        self.glora_A, self.glora_B = (Path(c.config_A_B, (out, inp), c.r, where, zeros) for _ in range(2))
        self.glora_C = Path(C, (inp, 1), c.r, where, zeros)
        self.glora_D, self.glora_E = (Path(D_E, (out,), c.r, where, zeros) for _ in range(2))

    def reset(self, c):
        for path in (self.glora_A, self.glora_B, self.glora_C, self.glora_D, self.glora_E):
            path.reset(c.init_weights)

    def remakes(self):
        return 0.0 if self.glora_A.how == "lora" else None

    def output(self, x, y):
        """y is W x + b. Vectors and numbers act on the activations, so that no weight is formed."""
        b, W = self.layer.base_bias(), self.base_weight()
        shift = self.bias_shift(W)
        if self.glora_A.how == "lora":
            dtype = self.glora_A.Xd.dtype
            x = self.cast(x, dtype)
            y = y + self.layer.op(x, self.delta(W.to(torch.promote_types(W.dtype, dtype))).to(x.dtype))
            return y if shift is None else y + shift
        if self.glora_A.how == "none":
            return y if shift is None else y + shift
        A, B = self.glora_A.X.flatten(), self.glora_B.X.flatten()
        y = y * (1 + A)
        if b is not None:
            y.add_(-A * b if shift is None else shift - A * b)
        return y.addcmul_(x.sum(-1, keepdim=True, dtype=y.dtype), B)

    def bias_shift(self, W):
        """b∘D + E + W C, or None."""
        b, D = self.layer.base_bias(), self.glora_D
        if b is None:
            return None
        shift = None if D.how == "none" else b * D.X + self.glora_E.X
        if (C := self.glora_C(W.dtype)) is None:
            return shift
        read = (W @ C.clone()).flatten()  # a copy: the last bit depends on alignment, and loaded tensors lie anywhere
        return read if shift is None else shift + read

    def merged_bias(self, b, W):
        shift = self.bias_shift(W)
        return b if shift is None else b + shift

    def merged_weight(self, W):
        A = self.glora_A(W.dtype)
        return W if A is None else self.plus_B(torch.addcmul(W, W, A))

    def delta(self, W):
        A = self.glora_A(W.dtype)
        return torch.zeros_like(W) if A is None else self.plus_B(W * A)

    def plus_B(self, W):
        B = self.glora_B
        return torch.addmm(W, B.Xd.to(W.dtype), B.Xu.to(W.dtype)) if B.how == "lora" else W + B(W.dtype)


GloraLayer = layer_class("GloraLayer", Glora)
GloraModel = tuner_class("GloraModel", GloraLayer, LORA_TARGETS)
register("GLORA", GloraConfig, tuner=GloraModel, prefix="glora_")
