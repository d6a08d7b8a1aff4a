"""Lily: A is shared by neighbouring layers, and all layers of a kind mix the same B's, each in its own way
(arXiv 2407.09946)."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from peft.config import TargetConfig
from peft.core.adapter import Adapter, Mod, Val
from peft.core.defaults import LORA_TARGETS
from peft.core.layer import AdapterLayer
from peft.core.tuner import Tuner
from peft.core.validate import check_range
from peft.enums import PeftType
from peft.layers.linear import linear
from peft.registry import register


@dataclass
class LilyConfig(TargetConfig):
    """Lily on linear layers. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.LILY

    r: int = field(default=32, metadata={"help": "rank of A and of each B"})
    stride_A: int = field(default=1, metadata={"help": "so many layers in a row share an A"})
    num_B: int = field(default=2, metadata={"help": "number of B's that are mixed"})
    scaling: float = field(default=1.0, metadata={"help": "the update is scaled by this"})
    init_weights: bool = field(default=True, metadata={"help": "start as the base model (B = 0), else at random"})

    def __post_init__(self):
        super().__post_init__()
        for name in ("r", "stride_A", "num_B"):
            check_range(self, name, 1)


class Lily(Adapter):
    """y + s·(A x)·(Σ pᵢBᵢ), p the mean over all tokens of softmax(router(A x))."""

    prefix = "lily_"
    by_row = False  # the mixture is one for the whole batch

    lily_A, lily_B, lily_router = Mod(), Mod(), Mod()  # in -> r; weight (num_B * r, out); r -> num_B
    r, scaling, stride_A, num_B = Val(), Val(), Val(), Val()

    def build(self, c, where):
        out, inp = self.layer.shape
        self.r, self.scaling, self.stride_A, self.num_B = c.r, c.scaling, c.stride_A, c.num_B
        self.lily_A = linear(inp, c.r, False, **where)
        self.lily_B = linear(out, c.num_B * c.r, False, **where)
        self.lily_router = linear(c.r, c.num_B, False, **where)

    def reset(self, c):
        for module, zero in ((self.lily_A, False), (self.lily_B, c.init_weights), (self.lily_router, False)):
            bound = 1 / math.sqrt(module.weight.shape[1])
            module.weight.zero_() if zero else module.weight.uniform_(-bound, bound)

    def output(self, x, y):
        B = self.lily_B.weight.view(self.num_B, self.r, -1)
        h = self.lily_A(self.cast(x, B.dtype))
        shares = self.lily_router(h).softmax(-1).flatten(0, -2).mean(0)
        mixed = torch.tensordot(shares.to(B.dtype), B, 1)
        return torch.add(y, (h @ mixed.to(h.dtype)).to(y.dtype), alpha=self.scaling)


class LilyLayer(AdapterLayer):
    """A base layer with Lily adapters."""

    adapter_cls = Lily


class LilyModel(Tuner):
    """A model with Lily adapters."""

    layer_cls = LilyLayer
    target_module_mapping = LORA_TARGETS

    def _add_to_targets(self, name, config, state_dict, how):
        super()._add_to_targets(name, config, state_dict, how)
        self._collect()
        groups = {}
        for layer in self.layers.values():
            if isinstance(layer, LilyLayer) and name in layer.adapters:
                groups.setdefault((ending(config, layer.adapters[name].key), layer.shape), []).append(
                    layer.adapters[name]
                )
        for adapters in groups.values():
            for i, adapter in enumerate(adapters):
                adapter.lily_B = adapters[0].lily_B
                adapter.lily_A = adapters[i - i % config.stride_A].lily_A


def ending(config, key):
    """What layers with this name have in common: the name that targets them."""
    targets = config.target_modules
    return targets if isinstance(targets, str) else max((t for t in targets if key.endswith(t)), key=len, default=key)


register("LILY", LilyConfig, tuner=LilyModel, prefix="lily_")
