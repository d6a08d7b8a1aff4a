"""RandLoRA, W + s·Σᵢ Bᵢ·Λᵢ·A·Γᵢ: random Bᵢ and A, frozen and shared, make up a full rank (arXiv 2502.00987)."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn

from peft.config import LayersConfig
from peft.core import match
from peft.core.adapter import Additive, Buf, Mod, Param, Val, dropout_rate
from peft.core.declare import layer_class
from peft.core.defaults import LORA_TARGETS
from peft.core.tuner import Tuner
from peft.core.validate import check_range
from peft.enums import PeftType
from peft.errors import ConfigError
from peft.methods.seeded import SeededBases, check_same_bases, largest
from peft.ops import lowrank, matmul
from peft.ops.lowrank import LowRank
from peft.registry import register


@dataclass
class RandLoraConfig(LayersConfig):
    """RandLoRA on linear layers. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.RANDLORA

    r: int = field(default=32, metadata={"help": "rank of each base; the smaller, the more of them, and of Λ and Γ"})
    projection_prng_key: int = field(default=0, metadata={"help": "seed of the shared bases"})
    save_projection: bool = field(default=True, metadata={"help": "keep the bases in the file, not only their seed"})
    sparse: bool = field(default=False, metadata={"help": "bases of -1, 0 and 1, two thirds of them 0"})
    very_sparse: bool = field(default=False, metadata={"help": "bases of -1, 0 and 1, all but 1 in √width of them 0"})
    randlora_dropout: float = field(default=0.0, metadata={"help": "dropout probability on the update's input"})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "the base stores (in, out), as Conv1D does"})
    randlora_alpha: int = field(default=640, metadata={"help": "s is randlora_alpha / r"})
    bias: Literal["none", "all", "randlora_only"] = field(default="none", metadata={"help": "base biases to train"})
    init_weights: bool = field(default=True, metadata={"help": "start as the base model (Λ = 0), else at random"})

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "r", 1)
        check_range(self, "randlora_dropout", 0, 1)


class RandLora(SeededBases, Additive):
    """For a layer with more inputs than outputs, it is the transpose of the formula that is added."""

    prefix = "randlora_"
    converts = True
    bases = ("randlora_A", "randlora_B")

    randlora_dropout = Mod(trainable=False)
    randlora_lambda, randlora_gamma = Param(), Param()  # (r, n), (n, smaller width), n bases
    randlora_A, randlora_B = Buf(shared=True), Buf(shared=True)  # (r, 1, width), (width, n, r): layers use a corner
    r, scaling = Val(), Val()

    @classmethod
    def share(cls, c, layers, where):
        generator, (narrow, wide) = torch.Generator().manual_seed(c.projection_prng_key), sorted(largest(layers))
        n = math.ceil(narrow / c.r)
        if c.sparse or c.very_sparse:
            A, B = torch.rand((c.r, 1, narrow), generator=generator), torch.rand((wide, n, c.r), generator=generator)
            tail = 0.5 / (narrow**0.5 if c.very_sparse else 3)
            A, B = ((t > 1 - tail).float() - (t < tail).float() for t in (A, B))
        else:
            A = uniform((c.r, 1, narrow), generator)
            B = torch.cat([uniform((wide, 1, c.r), generator) for _ in range(n)], dim=1)
        if not (A.any() and B.any()):
            raise ConfigError("The sparse bases are all 0. Choose another projection_prng_key or a larger r.")
        return {"randlora_A": (A / A.std()).to(**where), "randlora_B": (B / B.std()).to(**where)}

    @classmethod
    def to_file(cls, c, tensors):
        """Upstream's files repeat the bases for every layer."""
        shared = {k.rpartition(".")[2]: t for k, t in tensors.items() if k.endswith(cls.bases)}
        paths = [k.removesuffix("lambda") for k in tensors if k.endswith(".randlora_lambda")]
        copies = {p + name[-1]: t.clone() for p in paths for name, t in shared.items()}
        return {**tensors, **copies}

    @classmethod
    def from_file(cls, c, tensors, adapters):
        paths = [k.removesuffix("lambda") for k in tensors if k.endswith(".randlora_lambda")]
        copies = {p + name for p in paths for name in "AB"}
        return super().from_file(c, {k: t for k, t in tensors.items() if k not in copies}, adapters)

    def build(self, c, where):
        self.correct_layout(c)
        self.r, self.scaling = c.r, c.randlora_alpha / c.r
        if c.randlora_dropout:
            self.randlora_dropout = nn.Dropout(c.randlora_dropout)
        narrow = min(self.layer.shape)
        n = math.ceil(narrow / c.r)
        self.randlora_lambda = nn.Parameter(torch.empty(c.r, n, **where))
        self.randlora_gamma = nn.Parameter(torch.empty(n, narrow, **where))

    def reset(self, c):
        if c.init_weights:
            self.randlora_lambda.zero_()
            self.randlora_gamma.fill_(1 / max(self.randlora_gamma.shape))
        else:
            self.randlora_lambda.normal_()
            self.randlora_gamma.fill_(1 / max(self.layer.shape))

    def factors(self):
        """(n·r, in) and (out, n·r), with s.

        Column j of the one meets row j of the other, and they count j differently: A's rows vary faster with the base,
        B's columns with the rank. So upstream trained them, and so they must stay.
        """
        (out, inp), (n, narrow) = self.layer.shape, self.randlora_gamma.shape
        small = Scaled.apply(self.randlora_lambda * self.scaling, self.randlora_A[..., :narrow], self.randlora_gamma)
        small, large = small.flatten(0, 1), self.randlora_B[: max(out, inp), :n].flatten(1).to(small)
        return (small, large) if narrow == inp else (large.t(), small.t())

    # In half precision factors act on x. In float32 it takes less, for many rows of x, to multiply them.
    def low_rank(self):
        return self.pair() if self.base_dtype.itemsize < 4 else None

    def remakes(self):
        return self.dropout()

    @property
    def remakes_from(self):
        """Rows of x from which on W' costs less: products with the factors against those that make W' twice."""
        (out, inp), narrow = self.layer.shape, min(self.layer.shape)
        if not torch.is_grad_enabled():
            return out * inp // (out + inp)
        return 3 * narrow * out * inp // (2 * narrow * (out + inp) + narrow * narrow - out * inp)

    def dropout(self):
        return dropout_rate(self.randlora_dropout)

    def native_scaling(self):
        return self.config.randlora_alpha / self.r

    def pair(self):
        return LowRank(*self.factors(), 1.0, self.dropout())

    def output(self, x, y):
        return lowrank.add(self.base, y, x, self.pair())

    def delta_weight(self):
        first, second = self.factors()
        return matmul.times(second, first)

    def merged_weight(self, W):
        first, second = self.factors()
        return matmul.times(second.to(W.dtype), first.to(W.dtype)).add_(W)


class Scaled(torch.autograd.Function):
    """Λ (r, n), A (r, 1, width), Γ (n, width) -> Λ·A·Γ (r, n, width); nothing of that size is kept."""

    @staticmethod
    def forward(L, A, G):
        return (A * G).mul_(L.unsqueeze(-1))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        L, A, G = ctx.saved_tensors
        gA = g * A
        return (gA * G).sum(-1), None, (gA * L.unsqueeze(-1)).sum(0)


def uniform(shape, generator):
    """Uniform in ±1/√fan_in in bfloat16, as upstream draws it where the machine has bfloat16."""
    bound = math.prod(shape[1:]) ** -0.5
    return torch.empty(shape, dtype=torch.bfloat16).uniform_(-bound, bound, generator=generator)


RandLoraLayer = layer_class("RandLoraLayer", RandLora)


class RandLoraModel(Tuner):
    """A model with RandLoRA adapters."""

    layer_cls = RandLoraLayer
    target_module_mapping = LORA_TARGETS
    unsafe_targets = match.STATE_SPACE_UNSAFE

    def check_new_config(self, adapter_name, config):
        super().check_new_config(adapter_name, config)
        check_same_bases(self.configs_like(config))


register("RANDLORA", RandLoraConfig, tuner=RandLoraModel, prefix="randlora_")
