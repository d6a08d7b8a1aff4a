"""UniLoRA, W + BA where each number of A and B is a scaled one of a single trained vector (arXiv 2506.00799)."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import nn

from peft.config import LayersConfig
from peft.core.adapter import Buf, Mod, Param, Val, dropout_rate
from peft.core.declare import layer_class, tuner_class
from peft.core.defaults import LORA_TARGETS
from peft.core.validate import check_range
from peft.enums import PeftType
from peft.methods.factored import Factored
from peft.ops.lowrank import LowRank
from peft.registry import register


@dataclass
class UniLoraConfig(LayersConfig):
    """UniLoRA on linear layers. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.UNILORA

    r: int = field(default=4, metadata={"help": "rank of A and B"})
    proj_seed: int = field(default=42, metadata={"help": "seed of which number goes where"})
    theta_d_length: int = field(default=256, metadata={"help": "length of the trained vector"})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "the base stores (in, out), as Conv1D does"})
    bias: Literal["none", "all", "unilora_only"] = field(default="none", metadata={"help": "base biases to train"})
    unilora_dropout: float = field(default=0.0, metadata={"help": "dropout probability on the input of A"})
    init_theta_d_bound: float = field(default=0.02, metadata={"help": "the vector starts within ± this"})
    init_weights: bool = field(default=True, metadata={"help": "False: the vector starts normally distributed"})
    save_indices: bool = field(
        default=False, metadata={"help": "keep indices and scales in the file, not only the seed"}
    )

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "r", 1)
        check_range(self, "theta_d_length", 1)
        check_range(self, "unilora_dropout", 0, 1)


class UniLora(Factored):
    """A = theta[indices_A]∘scales_A, B likewise; scales are 1/√(how often a number is used)."""

    prefix = "unilora_"
    converts = True

    unilora_dropout = Mod(trainable=False)
    unilora_indices_A, unilora_indices_B = Buf(), Buf()  # (r, in), (out, r), int64
    unilora_scales_A, unilora_scales_B = Buf(), Buf()  # (r, in), (out, r)
    unilora_theta_d = Param(shared=True)  # (theta_d_length,)
    assignment = Val(shared=True)  # {layer key: (indices_A, indices_B)}, and under None 1/√count of each number
    r = Val()

    @classmethod
    def share(cls, c, layers, where):
        theta = torch.empty(c.theta_d_length)
        theta.uniform_(-c.init_theta_d_bound, c.init_theta_d_bound) if c.init_weights else theta.normal_()
        shapes = [shape for layer in layers.values() for shape in factor_shapes(layer, c.r)]
        indices = balanced_indices(sum(rows * columns for rows, columns in shapes), c.theta_d_length, c.proj_seed)
        parts = indices.split([rows * columns for rows, columns in shapes])
        parts = [part.view(shape) for part, shape in zip(parts, shapes)]
        assignment = dict(zip(layers, zip(parts[::2], parts[1::2])))
        assignment[None] = torch.bincount(indices, minlength=c.theta_d_length).clamp(min=1).float().rsqrt()
        return {"unilora_theta_d": nn.Parameter(theta.to(**where)), "assignment": assignment}

    @classmethod
    def unsaved(cls, c):
        names = ("unilora_indices_A", "unilora_indices_B", "unilora_scales_A", "unilora_scales_B")
        return () if c.save_indices else names

    def build(self, c, where):
        self.correct_layout(c)
        self.r = c.r
        if c.unilora_dropout:
            self.unilora_dropout = nn.Dropout(c.unilora_dropout)

    def derive(self, c):
        device, dtype = self.base_device, self.base_dtype
        indices, scale = self.assignment[self.key], self.assignment[None]
        self.unilora_indices_A, self.unilora_indices_B = (i.to(device).clone() for i in indices)
        self.unilora_scales_A, self.unilora_scales_B = (scale[i].to(device, dtype) for i in indices)

    def factors(self):
        """A (r, in) and B (out, r). Indexed with [], whose gradient is the same at each run on a GPU, too."""
        theta = self.unilora_theta_d
        A, B = theta[self.unilora_indices_A], theta[self.unilora_indices_B]
        return A * self.unilora_scales_A, B * self.unilora_scales_B

    def low_rank(self):
        return LowRank(*self.factors(), 1.0, dropout_rate(self.unilora_dropout))


def factor_shapes(layer, r):
    out, inp = layer.shape
    return [(r, inp), (out, r)]


def balanced_indices(count, length, seed):
    """`count` shuffled indices below `length`, each used equally often but for one; upstream's for the same seed."""
    rng = np.random.default_rng(seed)
    each, left = divmod(count, length)
    indices = np.tile(np.arange(length)[:, None], (1, each)).reshape(-1)
    if left:
        indices = np.append(indices, rng.choice(length, size=left, replace=False))
    rng.shuffle(indices)
    return torch.from_numpy(indices).long()


UniLoraLayer = layer_class("UniLoraLayer", UniLora)
UniLoraModel = tuner_class("UniLoraModel", UniLoraLayer, LORA_TARGETS)
register("UNILORA", UniLoraConfig, tuner=UniLoraModel, prefix="unilora_")
