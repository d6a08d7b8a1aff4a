"""PSOFT: the principal part of W, BA, becomes BRA with R orthogonal up to trained scales (arXiv 2505.11235)."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn

from peft.config import TargetConfig
from peft.core.adapter import Derived, Mod, Val, dropout_rate
from peft.core.declare import layer_class, tuner_class
from peft.core.defaults import LORA_TARGETS
from peft.core.validate import check_range
from peft.enums import PeftType
from peft.errors import ConfigError
from peft.methods.factored import Factored
from peft.methods.orthogonal import cayley, cayley_neumann, skew
from peft.ops.lowrank import LowRank
from peft.registry import register


@dataclass
class PsoftConfig(TargetConfig):
    """PSOFT on linear layers. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.PSOFT

    r: int = field(default=32, metadata={"help": "singular directions of W that are turned"})
    psoft_alpha: int | float = field(default=32, metadata={"help": "the update is scaled by psoft_alpha / r"})
    psoft_dropout: float = field(default=0.0, metadata={"help": "dropout probability on the input of A"})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "the base stores (in, out), as Conv1D does"})
    ab_svd_init: Literal["psoft_init", "pissa_init"] = field(
        default="psoft_init", metadata={"help": "who gets the singular values: B alone, or both their root"}
    )
    psoft_svd: Literal["full", "lowrank"] = field(default="full", metadata={"help": "exact or randomised SVD"})
    psoft_svd_lowrank_niter: int = field(default=10, metadata={"help": "iterations of the randomised SVD"})
    random_seed: int = field(default=0, metadata={"help": "seed of the randomised SVD"})
    psoft_orth: bool = field(default=True, metadata={"help": "False: R is any matrix"})
    psoft_mag_b: bool = field(default=True, metadata={"help": "train a scale for each row of R"})
    psoft_mag_a: bool = field(default=True, metadata={"help": "train a scale for each column of R"})
    use_cayley_neumann: bool = field(default=False, metadata={"help": "a truncated series instead of an inverse"})
    num_cayley_neumann_terms: int = field(default=5, metadata={"help": "terms of that series"})
    cayley_neumann_eps: float | None = field(default=None, metadata={"help": "largest norm of Q in that series"})
    init_weights: bool = field(default=True, metadata={"help": "start as the base model (R = I), else near it"})

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "r", 1)
        check_range(self, "psoft_dropout", 0, 1)
        check_range(self, "num_cayley_neumann_terms", 1)
        eps = self.cayley_neumann_eps
        if eps is not None and not 0 < eps < 1:
            raise ConfigError(f"PsoftConfig.cayley_neumann_eps must be between 0 and 1, got {eps!r}.")


class Rotation(nn.Module):
    """What R is made of: weight (r(r−1)/2,) above the diagonal of Q, or (r, r); vector_b, vector_a (r,) or None."""

    def __init__(self, c, where):
        super().__init__()
        r = c.r
        self.weight = nn.Parameter(torch.empty((r * (r - 1) // 2,) if c.psoft_orth else (r, r), **where))
        self.vector_b = nn.Parameter(torch.empty(r, **where)) if c.psoft_mag_b else None
        self.vector_a = nn.Parameter(torch.empty(r, **where)) if c.psoft_mag_a else None


class Psoft(Factored):
    """y + s·B(R − I)A x, R = diag(b)·(I + Q)(I − Q)⁻¹·diag(a), Q skew-symmetric."""

    prefix = "psoft_"
    converts = True

    psoft_dropout = Mod(trainable=False)
    psoft_R = Mod()
    psoft_A, psoft_B = Derived(), Derived()  # (r, in), (out, r): s·BA is the principal part of W
    r, psoft_alpha, scaling = Val(), Val(), Val()

    def build(self, c, where):
        out, inp = self.layer.shape
        if c.r > min(out, inp):
            raise ConfigError(f"PsoftConfig.r={c.r} is more than {self.key}, {out} x {inp}, has singular directions.")
        self.r, self.psoft_alpha, self.scaling = c.r, c.psoft_alpha, c.psoft_alpha / c.r
        if c.psoft_dropout:
            self.psoft_dropout = nn.Dropout(c.psoft_dropout)
        self.psoft_R = Rotation(c, where)

    def derive(self, c):
        """Files hold R alone, and R has a meaning only for these very directions, signs included."""
        W, r = self.base_weight().float(), c.r
        if c.psoft_svd == "full":
            U, S, Vt = torch.linalg.svd(W, full_matrices=False)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(c.random_seed)
                U, S, V = torch.svd_lowrank(W, q=r, niter=c.psoft_svd_lowrank_niter)
            Vt = V.T
        U, S, Vt = U[:, :r], S[:r] / self.scaling, Vt[:r]
        root = S.sqrt()
        both = c.ab_svd_init == "pissa_init"
        self.psoft_A, self.psoft_B = (root[:, None] * Vt, U * root) if both else (Vt.contiguous(), U * S)

    def reset(self, c):
        p = self.psoft_R
        if not c.psoft_orth:
            nn.init.eye_(p.weight)
        else:
            p.weight.zero_()
        if not c.init_weights:
            p.weight.add_(torch.randn_like(p.weight), alpha=0.1)
        for v in (p.vector_b, p.vector_a):
            if v is not None:
                v.fill_(1)

    def rotation(self):
        """R, (r, r)."""
        c, p = self.config, self.psoft_R
        R = p.weight
        if c.psoft_orth:
            Q = skew(p.weight[None], self.r)
            if c.use_cayley_neumann:
                if c.cayley_neumann_eps is not None:
                    Q = Q * (c.cayley_neumann_eps / (Q.norm() + 1e-12)).clamp(max=1)
                R = cayley_neumann(Q, c.num_cayley_neumann_terms)[0]
            else:
                R = cayley(-Q)[0]
        R = R if p.vector_b is None else p.vector_b[:, None] * R
        return R if p.vector_a is None else R * p.vector_a

    def low_rank(self):
        R = self.rotation()
        R = R - torch.eye(self.r, dtype=R.dtype, device=R.device)
        p = dropout_rate(self.psoft_dropout)
        return LowRank(R @ self.psoft_A.to(R.dtype), self.psoft_B.to(R.dtype), float(self.scaling), p)

    def native_scaling(self):
        return self.psoft_alpha / self.r


PsoftLayer = layer_class("PsoftLayer", Psoft)
PsoftModel = tuner_class("PsoftModel", PsoftLayer, LORA_TARGETS)
register("PSOFT", PsoftConfig, tuner=PsoftModel, prefix="psoft_")
