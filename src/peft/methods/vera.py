"""VeRA, W + diag(b)·B·diag(d)·A; random A and B are frozen and shared by all layers (arXiv 2310.11454)."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn

from peft.config import LayersConfig
from peft.core.adapter import Buf, Mod, Param, Val, dropout_rate
from peft.core.declare import layer_class
from peft.core.defaults import VERA_TARGETS
from peft.core.tuner import Tuner
from peft.core.validate import check_range
from peft.enums import PeftType
from peft.methods.factored import Factored
from peft.methods.seeded import SeededBases, check_same_bases, kaiming_uniform, largest
from peft.ops.lowrank import LowRank
from peft.registry import register


@dataclass
class VeraConfig(LayersConfig):
    """VeRA on linear layers. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.VERA

    r: int = field(default=256, metadata={"help": "rank of the shared bases; the trained d has this length"})
    projection_prng_key: int = field(default=0, metadata={"help": "seed of the shared bases"})
    save_projection: bool = field(default=True, metadata={"help": "keep the bases in the file, not only their seed"})
    vera_dropout: float = field(default=0.0, metadata={"help": "dropout probability on the input of A"})
    d_initial: float = field(default=0.1, metadata={"help": "initial value of d"})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "the base stores (in, out), as Conv1D does"})
    bias: Literal["none", "all", "vera_only"] = field(default="none", metadata={"help": "base biases to train"})
    init_weights: bool = field(default=True, metadata={"help": "start as the base model (b = 0), else at random"})

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "r", 1)
        check_range(self, "vera_dropout", 0, 1)


class Vera(SeededBases, Factored):
    """y + b∘(B(d∘(A x)))."""

    prefix = "vera_lambda_"
    converts = True
    bases = ("vera_A", "vera_B")

    vera_dropout = Mod(trainable=False)
    vera_lambda_b, vera_lambda_d = Param(), Param()  # (out,), (r,)
    vera_A, vera_B = Buf(shared=True), Buf(shared=True)  # (r, largest in), (largest out, r): layers use a corner
    r = Val()

    @classmethod
    def share(cls, c, layers, where):
        generator, (out, inp) = torch.Generator().manual_seed(c.projection_prng_key), largest(layers)
        A, B = kaiming_uniform((c.r, inp), generator), kaiming_uniform((out, c.r), generator)
        return {"vera_A": A.to(where["device"]), "vera_B": B.to(where["device"])}

    def build(self, c, where):
        self.correct_layout(c)
        self.r = c.r
        if c.vera_dropout:
            self.vera_dropout = nn.Dropout(c.vera_dropout)
        self.vera_lambda_b = nn.Parameter(torch.empty(self.layer.shape[0], **where))
        self.vera_lambda_d = nn.Parameter(torch.empty(c.r, **where))

    def reset(self, c):
        if c.init_weights:
            self.vera_lambda_b.zero_()
            self.vera_lambda_d.fill_(c.d_initial)
        else:
            self.vera_lambda_b.normal_()
            self.vera_lambda_d.normal_()

    def low_rank(self):
        """This layer's corner of the bases, A (r, in) and B (out, r), between the trained vectors."""
        out, inp = self.layer.shape
        p = dropout_rate(self.vera_dropout)
        b, d = self.vera_lambda_b, self.vera_lambda_d
        return LowRank(self.vera_A[:, :inp], self.vera_B[:out], 1.0, p, inner=d, outer=b)


VeraLayer = layer_class("VeraLayer", Vera)


class VeraModel(Tuner):
    """A model with VeRA adapters."""

    layer_cls = VeraLayer
    target_module_mapping = VERA_TARGETS

    def check_new_config(self, adapter_name, config):
        super().check_new_config(adapter_name, config)
        check_same_bases(self.configs_like(config))


register("VERA", VeraConfig, tuner=VeraModel, prefix="vera_lambda_")
