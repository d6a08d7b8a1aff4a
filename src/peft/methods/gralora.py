"""GraLoRA: W in k × k blocks, each with a LoRA of rank r / k of its own; optionally a common one (arXiv 2505.20355)."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn

from peft.config import LayersConfig
from peft.core.adapter import Additive, Mod, Param, Val, through
from peft.core.declare import layer_class, tuner_class
from peft.core.defaults import LORA_TARGETS
from peft.core.validate import check_range
from peft.enums import PeftType
from peft.errors import ConfigError
from peft.layers.linear import linear
from peft.ops import lowrank, matmul
from peft.ops.lowrank import LowRank
from peft.registry import register


@dataclass
class GraloraConfig(LayersConfig):
    """GraLoRA on linear layers. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.GRALORA

    r: int = field(default=32, metadata={"help": "rank over all blocks of a column, divisible by gralora_k"})
    hybrid_r: int = field(default=0, metadata={"help": "rank of a LoRA over the whole of W beside them"})
    alpha: int = field(default=64, metadata={"help": "the update is scaled by alpha / (r + hybrid_r)"})
    gralora_dropout: float = field(default=0.0, metadata={"help": "dropout probability on the input of A"})
    gralora_k: int = field(default=2, metadata={"help": "blocks along each side of W"})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "the base stores (in, out), as Conv1D does"})
    bias: Literal["none", "all", "gralora_only"] = field(default="none", metadata={"help": "base biases to train"})
    init_weights: bool = field(default=True, metadata={"help": "start as the base model (B = 0), else at random"})

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "r", 1)
        check_range(self, "hybrid_r", 0)
        check_range(self, "gralora_k", 1)
        check_range(self, "gralora_dropout", 0, 1)
        if self.r % self.gralora_k:
            raise ConfigError(f"GraloraConfig.r must be divisible by gralora_k, got {self.r} and {self.gralora_k}.")


class Gralora(Additive):
    """Input block n goes through A[n] to r numbers; the j-th r / k of all these go through B[j] to output block j."""

    prefix = "gralora_"
    converts = True

    gralora_dropout = Mod(trainable=False)
    gralora_A, gralora_B = Param(), Param()  # (k, in / k, r), (k, r, out / k)
    gralora_A_general, gralora_B_general = Mod(), Mod()  # in -> hybrid_r -> out
    r, hybrid_r, alpha, gralora_k, scaling = Val(), Val(), Val(), Val(), Val()

    def build(self, c, where):
        (out, inp), k = self.layer.shape, c.gralora_k
        if inp % k or out % k:
            raise ConfigError(
                f"gralora_k={k} does not divide {self.key}, whose weight is {out} x {inp}. Choose another."
            )
        self.r, self.hybrid_r, self.alpha, self.gralora_k = c.r, c.hybrid_r, c.alpha, k
        self.scaling = c.alpha / (c.r + c.hybrid_r)
        if c.gralora_dropout:
            self.gralora_dropout = nn.Dropout(c.gralora_dropout)
        self.gralora_A = nn.Parameter(torch.empty(k, inp // k, c.r, **where))
        self.gralora_B = nn.Parameter(torch.empty(k, c.r, out // k, **where))
        if c.hybrid_r:
            self.gralora_A_general = linear(inp, c.hybrid_r, False, **where)
            self.gralora_B_general = linear(c.hybrid_r, out, False, **where)

    def reset(self, c):
        k, inp, _ = self.gralora_A.shape
        pairs = [(self.gralora_A, inp), (self.gralora_B, c.r)]
        if c.hybrid_r:
            pairs += [(self.gralora_A_general.weight, k * inp), (self.gralora_B_general.weight, c.hybrid_r)]
        for i, (t, fan_in) in enumerate(pairs):
            bound = 1 / math.sqrt(fan_in)
            t.zero_() if i % 2 and c.init_weights else t.uniform_(-bound, bound)

    def native_scaling(self):
        return self.alpha / (self.r + self.hybrid_r)

    def output(self, x, y):
        A, B, s = self.gralora_A, self.gralora_B, self.scaling
        h = through(self.gralora_dropout, self.cast(x, A.dtype) if lowrank.is_exact() else x)
        if self.gralora_A_general is not None:
            pair = LowRank(self.gralora_A_general.weight, self.gralora_B_general.weight, s)
            y = lowrank.add(self.base, y, h, pair)
        return add(y, h, A.to(h.dtype), B.to(h.dtype), s)

    def delta_weight(self):
        A, B, k = self.gralora_A, self.gralora_B, self.gralora_k
        A = A.view(*A.shape[:2], k, -1)  # (from, in / k, to, r / k)
        B = B.view(k, k, -1, B.shape[-1])  # (to, from, r / k, out / k)
        delta = torch.einsum("nijr,jnro->joni", A, B).reshape(self.layer.shape)
        if self.gralora_A_general is not None:
            delta = delta + self.gralora_B_general.weight @ self.gralora_A_general.weight
        return delta * self.scaling


def add(y, x, A, B, s):
    """y + s·(blocks of x through A and B); y (..., out), x (..., in)."""
    y2, x2 = y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
    if y.dtype != x.dtype or not matmul.is_plain(x):
        return _plain(y2, x2, A, B, s).view(y.shape)
    return AddBlocks.apply(y2, x2, A, B, s).view(y.shape)


def _blocks(t, k):
    """(rows, k·n) -> (k, rows, n), a view."""
    return t.view(len(t), k, -1).transpose(0, 1)


def _exchanged(t):
    """(k, rows, k·n), first by the block that it comes from, then by where it goes to -> the other way round."""
    k, rows, _ = t.shape
    return t.view(k, rows, k, -1).permute(2, 1, 0, 3).reshape(t.shape)


def _plain(y, x, A, B, s):
    h = _exchanged(torch.bmm(_blocks(x, len(A)), A))
    return y + (torch.bmm(h, B).transpose(0, 1).reshape(y.shape) * s).to(y.dtype)


class AddBlocks(torch.autograd.Function):
    """y (rows, out), x (rows, in), A, B, s -> y + s·update. Outputs and gradients are written where they belong."""

    @staticmethod
    def forward(ctx, y, x, A, B, s):
        h = _exchanged(torch.bmm(_blocks(x, len(A)), A))
        ctx.save_for_backward(x, A, B, h)
        ctx.s = s
        y = y.clone(memory_format=torch.contiguous_format)
        _blocks(y, len(A)).baddbmm_(h, B, alpha=s)
        return y

    @staticmethod
    def backward(ctx, g):
        x, A, B, h = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:4]
        if torch.is_grad_enabled():  # double backward: the gradients depend on x, A, B and g
            update = _plain(torch.zeros_like(g), x, A, B, ctx.s)
            found = iter(torch.autograd.grad(update, [t for t, n in zip((x, A, B), needed) if n], g, create_graph=True))
            return g, *(next(found) if n else None for n in needed), None
        k, g = len(A), g.contiguous()
        gb, dx, dA, dB = _blocks(g, k), None, None, None
        if needed[2]:
            dB = torch.bmm(h.transpose(1, 2), gb).mul_(ctx.s)
        if needed[0] or needed[1]:
            gh = _exchanged(torch.bmm(gb, (B * ctx.s).transpose(1, 2)))
            if needed[0]:
                dx = torch.empty_like(x, memory_format=torch.contiguous_format)
                torch.bmm(gh, A.transpose(1, 2), out=_blocks(dx, k))
            if needed[1]:
                dA = torch.bmm(_blocks(x, k).transpose(1, 2), gh)
        return g, dx, dA, dB, None


GraloraLayer = layer_class("GraloraLayer", Gralora)
GraloraModel = tuner_class("GraloraModel", GraloraLayer, LORA_TARGETS)
register("GRALORA", GraloraConfig, tuner=GraloraModel, prefix="gralora_")
