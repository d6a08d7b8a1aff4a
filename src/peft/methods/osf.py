"""OSF, W + U·diag(S)·V − U₀·diag(S₀)·V₀: W's lesser singular directions are trained, never into the greater ones, which
hold what W knows (arXiv 2504.07097)."""

import re
import warnings
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from peft.config import ModulesConfig
from peft.core import match
from peft.core.adapter import Additive, Derived, Mod, Val
from peft.core.declare import layer_class
from peft.core.defaults import OSF_TARGETS
from peft.core.tuner import Tuner
from peft.enums import PeftType
from peft.errors import ConfigError, PeftWarning
from peft.ops import matmul
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
        if self.target_svd_config:
            warnings.warn(
                "OSFConfig.target_svd_config has no effect; rank_pattern sets the ranks of single layers.",
                PeftWarning,
                stacklevel=3,
            )


class OSF(Additive):
    """W' = W + U·diag(S)·V − (what that product was at first).

    osf_svd_params  U_low (out, n − k), S_low (n − k,), V_low (n − k, in), n the smaller side of W, k the frozen rank
    Unmerging, which upstream refuses, is exact.
    """

    prefix = "osf_"

    osf_svd_params = Mod()
    osf_start = Derived()  # (out, in): the trained part of W, as it was
    osf_U_side, osf_V_side = Derived(), Derived()  # (out, m), (in, m): see `_side`
    effective_rank = Val()

    low = None  # the first U_low, S_low and V_low, between deriving and initialising

    def build(self, c, where):
        out, inp = self.layer.shape
        least = min(out, inp)
        asked = next((r for p, r in (c.rank_pattern or {}).items() if re.search(p, self.key)), c.effective_rank)
        asked = 0.5 if asked is None else asked
        k = min(least, int(least * asked if isinstance(asked, float) and asked <= 1 else asked))
        if k < 1:
            raise ConfigError(
                f"OSF's effective_rank={asked!r} leaves no frozen direction of {self.key}, {out} x {inp}."
            )
        self.effective_rank, n = k, least - k
        shapes = {"U_low": (out, n), "S_low": (n,), "V_low": (n, inp)}
        self.osf_svd_params = nn.ParameterDict({name: torch.empty(s, **where) for name, s in shapes.items()})

    def derive(self, c):
        k, like, W = self.effective_rank, self.osf_svd_params["S_low"], self.base_weight()
        parts = torch.linalg.svd(W.float(), full_matrices=False)
        U, S, V = (t.to(W.dtype).to(like.dtype) for t in parts)  # through W's dtype, as files of such a base have it
        low = {"U_low": U[:, k:].contiguous(), "S_low": S[k:], "V_low": V[k:]}
        self.osf_start = matmul.times(low["U_low"] * low["S_low"], low["V_low"])
        self.osf_U_side, self.osf_V_side = self._side(U), self._side(V.T)
        self.low = None if like.is_meta else low

    def _side(self, vectors):
        """Of singular vectors (d, n), those that gradients must be orthogonal to. Where they are a whole basis, those
        that gradients must be made of will do, and are taken if they are fewer."""
        (d, n), k = vectors.shape, self.effective_rank
        return (vectors[:, k:] if d == n and n - k < k else vectors[:, :k]).contiguous()

    def reset(self, c):
        if self.low is None:  # a file left some of it out
            self.derive(c)
        for name, p in self.osf_svd_params.items():
            p.normal_() if c.init_weights is False else p.copy_(self.low[name])
        self.low = None

    def remakes(self):
        """The product U·S·V does not depend on how many tokens there are."""
        return 0.0

    def delta_weight(self):
        p, k = self.osf_svd_params, self.effective_rank
        U, S, V = p["U_low"], p["S_low"], p["V_low"]
        if torch.is_grad_enabled():
            U = Orthogonal.apply(U, self.osf_U_side.to(U), k)
            V = Orthogonal.apply(V.T, self.osf_V_side.to(V), k).T
        return matmul.times(U * S, V).sub_(self.osf_start.to(S))

    def merged_weight(self, W):
        return self.delta(W).add_(W)


class Orthogonal(torch.autograd.Function):
    """U (d, n), whose gradient loses what lies in the span of the k columns of `side` (d, k).

    A side that has not k columns spans what it may keep. (Not a hook on U, as upstream has it: copies and loaders would
    lose that.)
    """

    @staticmethod
    def forward(ctx, U, side, k):
        ctx.save_for_backward(side)
        ctx.k = k
        return U.view_as(U)

    @staticmethod
    def backward(ctx, g):
        (side,) = ctx.saved_tensors
        part = matmul.matmul(side, matmul.matmul(side.T, g))
        return g - part if side.shape[1] == ctx.k else part, None, None


OSFLayer = layer_class("OSFLayer", OSF)


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
