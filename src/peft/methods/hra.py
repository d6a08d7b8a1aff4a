"""HRA, the input through a chain of Householder reflections: y = W·H₁H₂···Hᵣx, H = I - 2uuᵀ/‖u‖² (arXiv 2405.17484)."""

import warnings
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from peft.config import TargetConfig
from peft.core.adapter import Param, Val
from peft.core.declare import layer_class, tuner_class
from peft.core.defaults import LORA_TARGETS
from peft.core.validate import check_range
from peft.enums import PeftType
from peft.errors import ConfigError
from peft.methods.orthogonal import Rotation
from peft.registry import register


@dataclass
class HRAConfig(TargetConfig):
    """HRA on linear layers and convolutions. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.HRA

    r: int = field(default=8, metadata={"help": "number of reflections; even, so that they can cancel out at first"})
    apply_GS: bool = field(default=False, metadata={"help": "make the u orthogonal (Gram-Schmidt) in every forward"})
    init_weights: bool = field(default=True, metadata={"help": "start as the base model, else at random"})
    bias: str = field(default="none", metadata={"help": "base biases to train: none, all or hra_only"})

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "r", 1)
        if self.bias not in ("none", "all", "hra_only"):
            raise ConfigError(f"HRAConfig.bias must be one of 'none', 'all', 'hra_only', got {self.bias!r}.")


class HRA(Rotation):
    """x M for row vectors x, M = Hᵣ···H₁ = I - U TᵀUᵀ with T of r × r: no matrix of the layer's size is formed.

    H₁···Hᵣ = I - U T Uᵀ where T⁻¹ is the upper triangle of UᵀU with half its diagonal; for the orthogonalised u the
    product is I - 2U(UᵀU)⁻¹Uᵀ, whatever their order.
    """

    prefix = "hra_"

    hra_u = Param()  # (inputs, r), each column a u
    hra_r = Val()

    def build(self, c, where):
        self.refuse_groups()
        if c.apply_GS and c.r > self.width:
            raise ConfigError(f"apply_GS=True needs r of at most {self.width}, the inputs of {self.key}; r is {c.r}.")
        self.hra_r = c.r
        self.hra_u = nn.Parameter(torch.empty(self.width, c.r, **where))

    def reset(self, c):
        """Equal neighbours cancel out; orthogonal ones never do (upstream starts from NaN), nor does an odd one."""
        if c.init_weights and c.r % 2 == 0 and not c.apply_GS:
            half = torch.empty_like(self.hra_u[:, ::2])
            bound = half.shape[1] ** -0.5
            self.hra_u.copy_(half.uniform_(-bound, bound).repeat_interleave(2, dim=1))
            return
        if c.init_weights:
            why = "apply_GS=True" if c.apply_GS else f"an odd r={c.r}"
            warnings.warn(f"HRA with {why} cannot start as the base model; {self.key} starts at random.", stacklevel=2)
        bound = c.r**-0.5
        self.hra_u.uniform_(-bound, bound)

    def turn(self, x, back=False):
        U = self.hra_u
        exact = U if U.dtype == torch.float64 else U.float()
        gram = exact.T @ exact
        if self.config.apply_GS:
            T = 2 * torch.linalg.inv_ex(gram).inverse
        else:
            eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            T = torch.linalg.solve_triangular(gram.triu(1) + gram * eye / 2, eye, upper=True)
        U = U.to(x.dtype)
        h = ((x @ U).to(T.dtype) @ (T if back else T.T)).to(x.dtype)
        return torch.addmm(x.reshape(-1, x.shape[-1]), h.flatten(0, -2), U.T, alpha=-1).view(x.shape)


HRALayer = layer_class("HRALayer", HRA)
HRAModel = tuner_class("HRAModel", HRALayer, LORA_TARGETS)
register("HRA", HRAConfig, tuner=HRAModel, prefix="hra_")
