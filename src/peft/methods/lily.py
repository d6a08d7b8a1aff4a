"""Lily, Wx + b + s·B(x)Ax: neighbours share A; all alike share experts B, mixed by a router (arXiv 2407.09946)."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from peft.config import TargetConfig
from peft.core.adapter import Adapter, Mod, Val
from peft.core.declare import layer_class
from peft.core.defaults import LORA_TARGETS
from peft.core.tuner import Tuner
from peft.core.validate import check_range
from peft.enums import PeftType
from peft.layers.linear import linear
from peft.registry import register


@dataclass
class LilyConfig(TargetConfig):
    """Lily on linear layers. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.LILY

    r: int = field(default=32, metadata={"help": "rank of A and of each expert"})
    stride_A: int = field(default=1, metadata={"help": "number of consecutive layers that share one A"})
    num_B: int = field(default=2, metadata={"help": "number of experts B"})
    scaling: float = field(default=1.0, metadata={"help": "factor of the update"})
    init_weights: bool = field(default=True, metadata={"help": "start as the base model (B = 0), else at random"})

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "r", 1)
        check_range(self, "stride_A", 1)
        check_range(self, "num_B", 2)
        check_range(self, "scaling")


class Lily(Adapter):
    """y + s·h·Σ_e p_e B_e, where h = A x and p is softmax(router(h)), averaged over all tokens of the batch."""

    prefix = "lily_"
    folds = False
    by_row = False

    lily_A, lily_B = Mod(), Mod()  # (r, in), (experts · r, out)
    lily_router = Mod()  # (experts, r)
    r, scaling, stride_A, num_B = Val(), Val(), Val(), Val()

    def build(self, c, where):
        out, inp = self.layer.shape
        self.r, self.scaling, self.stride_A, self.num_B = c.r, c.scaling, c.stride_A, c.num_B
        self.lily_A = linear(inp, c.r, False, **where)
        self.lily_B = linear(out, c.num_B * c.r, False, **where)
        self.lily_router = linear(c.r, c.num_B, False, **where)

    def reset(self, c):
        nn.init.kaiming_uniform_(self.lily_A.weight, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.lily_router.weight, a=math.sqrt(5))
        if c.init_weights:
            self.lily_B.weight.zero_()
        else:
            nn.init.kaiming_uniform_(self.lily_B.weight, a=math.sqrt(5))

    @classmethod
    def from_file(cls, c, tensors, adapters):
        """A file holds what layers share once for each. Where its copies differ it was not shared: upstream lets only
        the first adapter of a model share."""
        first = {}
        for a in adapters:
            for name in ("lily_A", "lily_B"):
                module, ending = getattr(a, name), f"{a.key}.{name}.weight"
                found = next((tensors[k] for k in (f"base_model.model.{ending}", ending) if k in tensors), None)
                other = first.setdefault(module, found)
                if found is not None and other is not None and not torch.equal(found, other):
                    a.stand_alone(name)
        return tensors

    def stand_alone(self, name):
        """Give this layer an A or B of its own in place of a shared one."""
        W = getattr(self, name).weight
        setattr(self, name, linear(W.shape[1], W.shape[0], False, device=W.device, dtype=W.dtype))
        self.set_trainable(self.trainable)

    def native_scaling(self):
        return self.config.scaling

    def output(self, x, y):
        R, B = self.lily_router.weight, self.lily_B.weight
        h = F.linear(x, self.lily_A.weight.to(x.dtype)).flatten(0, -2)
        p = F.linear(h.to(R.dtype), R).softmax(-1).mean(0)
        B = torch.einsum("e,ero->ro", p.to(B.dtype), B.view(self.num_B, self.r, -1)).to(y.dtype)
        return torch.addmm(y.flatten(0, -2), h.to(y.dtype), B, alpha=self.scaling).view(y.shape)

    def beside(self, x, y, y0):
        return self.output(x, y)


LilyLayer = layer_class("LilyLayer", Lily)


class LilyModel(Tuner):
    """A model with Lily adapters."""

    layer_cls = LilyLayer
    target_module_mapping = LORA_TARGETS

    def _add_to_targets(self, name, config, state_dict, how):
        super()._add_to_targets(name, config, state_dict, how)
        self._collect()
        alike = {}
        for layer in self.layers.values():
            if isinstance(layer, LilyLayer) and name in layer.adapters:
                adapter = layer.adapters[name]
                if (target := _target(config.target_modules, adapter.key)) is not None:
                    alike.setdefault((target, layer.shape), []).append(adapter)
        for adapters in alike.values():
            for i, adapter in enumerate(adapters):
                adapter.lily_A = adapters[i - i % config.stride_A].lily_A
                adapter.lily_B = adapters[0].lily_B


def _target(names, key):
    """The entry of target_modules that makes layers alike: the regex, or the longest name that the key ends with."""
    return names if isinstance(names, str) else max((n for n in names if key.endswith(n)), key=len, default=None)


register("LILY", LilyConfig, tuner=LilyModel, prefix="lily_")
