"""PVeRA, VeRA whose inner vector is drawn: y + b∘(B z), z ~ N(μ, σ²), (μ, log σ²) = d∘(A x) (arXiv 2512.07703)."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn

from peft.config import LayersConfig
from peft.core.adapter import Additive, Buf, Mod, Param, Val, through
from peft.core.declare import layer_class
from peft.core.defaults import PVERA_TARGETS
from peft.core.tuner import Tuner
from peft.core.validate import check_range
from peft.enums import PeftType
from peft.methods.seeded import SeededBases, check_same_bases, kaiming_uniform, largest
from peft.ops import lowrank
from peft.ops.lowrank import LowRank
from peft.registry import register


@dataclass
class PveraConfig(LayersConfig):
    """PVeRA on linear layers. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.PVERA

    r: int = field(default=256, metadata={"help": "length of z; A has a row for each mean and each variance"})
    projection_prng_key: int = field(default=0, metadata={"help": "seed of the shared bases"})
    save_projection: bool = field(default=True, metadata={"help": "keep the bases in the file, not only their seed"})
    pvera_dropout: float = field(default=0.0, metadata={"help": "dropout probability on the input of A"})
    d_initial: float = field(default=0.1, metadata={"help": "initial value of d"})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "the base stores (in, out), as Conv1D does"})
    bias: Literal["none", "all", "pvera_only"] = field(default="none", metadata={"help": "base biases to train"})
    init_weights: bool = field(default=True, metadata={"help": "start as the base model (b = 0), else at random"})
    sample_at_inference: bool = field(default=False, metadata={"help": "draw z in evaluation too, else use its mean"})
    generator_seed: int | None = field(
        default=None, metadata={"help": "seed of each layer's own generator for z; None: torch's generator"}
    )

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "r", 1)
        check_range(self, "pvera_dropout", 0, 1)


class Pvera(SeededBases, Additive):
    """In evaluation it uses the mean of z, which is VeRA with the first half of A and d. It is merged to that, too."""

    prefix = "pvera_lambda_"
    bases = ("pvera_A", "pvera_B")

    pvera_dropout = Mod(trainable=False)
    pvera_lambda_b, pvera_lambda_d = Param(), Param()  # (out,), (2r,)
    pvera_A, pvera_B = Buf(shared=True), Buf(shared=True)  # (2r, largest in), (largest out, r): layers use a corner
    r, sample_at_inference, pvera_generator = Val(), Val(), Val()

    @classmethod
    def share(cls, c, layers, where):
        generator, (out, inp) = torch.Generator().manual_seed(c.projection_prng_key), largest(layers)
        A, B = kaiming_uniform((2 * c.r, inp), generator), kaiming_uniform((out, c.r), generator)
        return {"pvera_A": A.to(where["device"]), "pvera_B": B.to(where["device"])}

    @property
    def folds(self):
        return not self.sample_at_inference

    def build(self, c, where):
        self.correct_layout(c)
        self.r, self.sample_at_inference = c.r, c.sample_at_inference
        self.pvera_generator = None if c.generator_seed is None else torch.Generator().manual_seed(c.generator_seed)
        if c.pvera_dropout:
            self.pvera_dropout = nn.Dropout(c.pvera_dropout)
        self.pvera_lambda_b = nn.Parameter(torch.empty(self.layer.shape[0], **where))
        self.pvera_lambda_d = nn.Parameter(torch.empty(2 * c.r, **where))

    def reset(self, c):
        if c.init_weights:
            self.pvera_lambda_b.zero_()
            self.pvera_lambda_d.fill_(c.d_initial)
        else:
            self.pvera_lambda_b.normal_()
            self.pvera_lambda_d.normal_()

    def corner(self):
        """A (2r, in) and B (out, r)."""
        out, inp = self.layer.shape
        return self.pvera_A[:, :inp], self.pvera_B[:out]

    def low_rank(self):
        return None if self.training or self.sample_at_inference else self.mean()

    def mean(self):
        (A, B), r, d = self.corner(), self.r, self.pvera_lambda_d
        return LowRank(A[:r], B, 1.0, inner=d[:r], outer=self.pvera_lambda_b)

    def output(self, x, y):
        if (f := self.low_rank()) is not None:
            return lowrank.add(self.base, y, x, f)
        A, B = self.corner()
        h = self.cast(through(self.pvera_dropout, x), y.dtype)
        mean, log_variance = (F.linear(h, A.to(h.dtype)) * self.pvera_lambda_d).chunk(2, -1)
        z = mean + self.noise(mean) * (log_variance / 2).exp()
        return (y + F.linear(z.to(h.dtype), B.to(h.dtype)) * self.pvera_lambda_b).to(y.dtype)

    def noise(self, like):
        if (generator := self.pvera_generator) is None:
            return torch.randn_like(like)
        return torch.randn(like.shape, dtype=like.dtype, generator=generator).to(like.device)

    def delta_weight(self):
        f = self.mean().absorbed()
        return f.B @ f.A


PveraLayer = layer_class("PveraLayer", Pvera)


class PveraModel(Tuner):
    """A model with PVeRA adapters."""

    layer_cls = PveraLayer
    target_module_mapping = PVERA_TARGETS

    def check_new_config(self, adapter_name, config):
        super().check_new_config(adapter_name, config)
        check_same_bases(self.configs_like(config))


register("PVERA", PveraConfig, tuner=PveraModel, prefix="pvera_lambda_")
