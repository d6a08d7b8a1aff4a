"""OSF: the lesser singular directions of W are trained; the greater ones, which hold what W knows, stay out of reach
(arXiv 2504.07097)."""

import re
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from peft.config import ModulesConfig
from peft.core import match
from peft.core.adapter import Additive, Derived, Mod, Val
from peft.core.defaults import OSF_TARGETS
from peft.core.layer import AdapterLayer
from peft.core.tuner import Tuner
from peft.enums import PeftType
from peft.errors import ConfigError
from peft.registry import register


@dataclass
class OSFConfig(ModulesConfig):
    """OSF on linear layers. Ranks below 1 are shares of the smaller side of W. Wrong values raise ConfigError."""

    METHOD: ClassVar = PeftType.OSF

    effective_rank: int | float | None = field(
        default=None, metadata={"help": "greatest directions that stay frozen; None: half of them"}
    )
    rank_pattern: dict[str, int | float] | None = field(
        default=None, metadata={"help": "other ranks by a regex found anywhere in the layer's name"}
    )
    init_weights: bool | None = field(default=True, metadata={"help": "False: the trained directions start at random"})
    target_svd_config: dict[str, int] | None = field(default=None, metadata={"help": "kept in files; has no effect"})

    def __post_init__(self):
        super().__post_init__()
        for value in (self.effective_rank, *(self.rank_pattern or {}).values()):
            if value is not None and value <= 0:
                raise ConfigError(f"OSFConfig.effective_rank and rank_pattern must be above 0, got {value!r}.")


class OSF(Additive):
    """W' = W + U·diag(S)·V − (what that product was at first).

    osf_svd_params  U_low (out, n − k), S_low (n − k,), V_low (n − k, in), n the smaller side of W, k the frozen rank
    """

    prefix = "osf_"

    osf_svd_params = Mod()
    osf_start = Derived()  # (out, in): the trained part of W, as it was
    osf_U_high, osf_V_high = Derived(), Derived()  # (out, k), (k, in): gradients stay orthogonal to these
    effective_rank = Val()

    def build(self, c, where):
        out, inp = self.layer.shape
        least = min(out, inp)
        asked = next((r for p, r in (c.rank_pattern or {}).items() if re.search(p, self.key)), c.effective_rank)
        k = least // 2 if asked is None else int(least * asked) if isinstance(asked, float) and asked <= 1 else int(asked)
        k = min(k, least)
        if k < 1:
            raise ConfigError(f"OSF's effective_rank={asked!r} leaves no frozen direction of {self.key}, {out} x {inp}.")
        self.effective_rank, n = k, least - k
        shapes = {"U_low": (out, n), "S_low": (n,), "V_low": (n, inp)}
        self.osf_svd_params = nn.ParameterDict({name: torch.empty(s, **where) for name, s in shapes.items()})

    def parts(self):
        """(U, S, V) of W, in the adapter's dtype."""
        like = self.osf_svd_params["S_low"].dtype
        W = self.base_weight()
        return [t.to(W.dtype).to(like) for t in torch.linalg.svd(W.float(), full_matrices=False)]

    def derive(self, c):
        k = self.effective_rank
        U, S, V = self.parts()
        self.osf_start = (U[:, k:] * S[k:]) @ V[k:]
        self.osf_U_high, self.osf_V_high = U[:, :k].contiguous(), V[:k].contiguous()

    def reset(self, c):
        k, p = self.effective_rank, self.osf_svd_params
        if c.init_weights is False:
            for t in p.values():
                t.normal_()
            return
        U, S, V = self.parts()
        for name, value in (("U_low", U[:, k:]), ("S_low", S[k:]), ("V_low", V[k:])):
            p[name].copy_(value)

    def remakes(self):
        """The product U·S·V does not depend on how many tokens there are."""
        return 0.0

    def delta_weight(self):
        p = self.osf_svd_params
        U = Orthogonal.apply(p["U_low"], self.osf_U_high.to(p["U_low"]))
        V = Orthogonal.apply(p["V_low"].T, self.osf_V_high.T.to(p["V_low"])).T
        return (U * p["S_low"]) @ V - self.osf_start.to(p["S_low"])


class Orthogonal(torch.autograd.Function):
    """The columns of U (d, n), whose gradient loses what lies in the span of the orthonormal columns of `fixed` (d, k)."""

    @staticmethod
    def forward(ctx, U, fixed):
        ctx.save_for_backward(fixed)
        return U.view_as(U)

    @staticmethod
    def backward(ctx, g):
        (fixed,) = ctx.saved_tensors
        return g - fixed @ (fixed.T @ g), None


class OSFLayer(AdapterLayer):
    """A base layer with OSF adapters."""

    adapter_cls = OSF


class OSFModel(Tuner):
    """A model with OSF adapters."""

    layer_cls = OSFLayer
    target_module_mapping = OSF_TARGETS

    def prepare_config(self, config):
        """Models without a default have all their linear layers adapted."""
        model_type = getattr(getattr(self.model, "config", None), "model_type", None)
        if config.target_modules is None and model_type not in self.target_module_mapping:
            config.target_modules = match.ALL_LINEAR
        super().prepare_config(config)


register("OSF", OSFConfig, tuner=OSFModel, prefix="osf_")
