"""KaSA: the r smallest singular components of W give way to s·B·diag(d)·A (arXiv 2412.06071)."""

from dataclasses import dataclass, field

import torch
from torch import nn

from peft.core.adapter import Derived, Param
from peft.core.validate import check_fields, check_range
from peft.errors import ConfigError
from peft.methods.lora.lora import Lora
from peft.ops import lowrank
from peft.ops.lowrank import LowRank


@dataclass
class KasaConfig:
    """How strongly `LoraModel._get_kasa_loss` pulls."""

    beta: float = field(default=1e-4, metadata={"help": "weight of the squared entries of d in the loss"})
    gamma: float = field(default=1e-3, metadata={"help": "weight of how far A and B are from orthonormal"})

    def __post_init__(self):
        check_fields(self)
        check_range(self, "beta", 0)
        check_range(self, "gamma", 0)


class Kasa(Lora):
    """W − L + s·B·diag(d)·A, where L is made of W's r smallest singular values. B = 0 at the start, which leaves W − L.

    Upstream overwrites W with W − L. Here L is subtracted while the adapter acts, so W stays as it was, and each
    adapter of a model is computed from the same W. Of several that act on one layer, the first subtracts its L.
    """

    kinds = ("linear",)
    title, converts = "KaSA", False

    lora_diag = Param()  # (r,)
    lora_lost_A, lora_lost_B = Derived(), Derived()  # (r, in), (out, r), whose product is L

    def build(self, c, where):
        super().build(c, where)
        self.lora_diag = nn.Parameter(torch.empty(self.r, **where))

    def _check_layer(self, c):
        super()._check_layer(c)
        if self.r >= min(self.layer.shape):
            raise ConfigError(
                f"r={self.r} must be smaller than both sides of {self.key}, {self.layer.shape}: KaSA takes r singular "
                "values away, and none would be left."
            )
        if c.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
            raise ConfigError(
                f"init_lora_weights={c.init_lora_weights!r} replaces components of W as kasa_config does; use only one."
            )

    def derive(self, c):
        W, like = self.base_weight(), self.lora_diag
        U, S, Vh = torch.linalg.svd(W.float(), full_matrices=False)
        self.lora_lost_A = (S[-self.r :, None] * Vh[-self.r :]).to(W.device, like.dtype)
        self.lora_lost_B = U[:, -self.r :].to(W.device, like.dtype).contiguous()

    def reset(self, c):
        super().reset(c)
        self.lora_diag.normal_()

    def effective_factors(self):
        return self.lora_A.weight * self.lora_diag[:, None], self.lora_B.weight

    def low_rank(self):
        """Both parts as one pair: alone on a layer, and without dropout, which W − L must not see."""
        f = self._replacement()
        if f.dropout or len(self.layer.live()) > 1:
            return None
        bias = None if f.bias is None else f.bias * f.s
        return LowRank(
            torch.cat([f.A, self.lora_lost_A.to(f.A.dtype)]),
            torch.cat([f.B * f.s, -self.lora_lost_B.to(f.B.dtype)], dim=1),
            1.0,
            bias=bias,
        )

    def output(self, x, y):
        return self.beside(x, lowrank.add(self.base, y, x, LowRank(self.lora_lost_A, self.lora_lost_B, -1.0)), y)

    def beside(self, x, y, y0):
        return lowrank.add(self.base, y, x, self._replacement())

    def _replacement(self):
        return self.pair(*self.effective_factors(), self.lora_B.bias)

    def merged_weight(self, W):
        A, B = self.lora_lost_A.to(W.dtype), self.lora_lost_B.to(W.dtype)
        return super().merged_weight(torch.addmm(W, B, A, alpha=-1))

    def penalty(self):
        """β·‖d‖² + γ·(‖BᵀB − I‖ + ‖AAᵀ − I‖)."""
        A, B, d, c = self.lora_A.weight, self.lora_B.weight, self.lora_diag, self.config.kasa_config
        eye = torch.eye(self.r, device=A.device, dtype=A.dtype)
        return c.beta * d.square().sum() + c.gamma * ((B.t() @ B - eye).norm() + (A @ A.t() - eye).norm())
