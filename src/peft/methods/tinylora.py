"""TinyLoRA, W + B(Σ vᵢPᵢ)A: A and B from the SVD of W, P random, and only the few numbers of v trained
(arXiv 2602.04118)."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn

from peft.config import LayersConfig
from peft.core.adapter import Additive, Buf, Mod, Val, dropout_rate, through
from peft.core.declare import layer_class
from peft.core.defaults import LORA_TARGETS
from peft.core.tuner import Tuner
from peft.core.validate import check_range
from peft.enums import PeftType
from peft.errors import ConfigError
from peft.ops import lowrank
from peft.ops.lowrank import LowRank
from peft.registry import register


@dataclass
class TinyLoraConfig(LayersConfig):
    """TinyLoRA on linear layers and embeddings. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.TINYLORA

    r: int = field(default=2, metadata={"help": "singular directions of W that are used"})
    u: int = field(default=64, metadata={"help": "length of v"})
    weight_tying: float = field(default=0.0, metadata={"help": "0: each layer has its own v; 1: one v for all"})
    projection_seed: int = field(default=42, metadata={"help": "seed of P; layer i uses this + i"})
    save_projection: bool = field(default=True, metadata={"help": "keep P in the file, not only its seed"})
    init_v_bound: float = field(default=0.02, metadata={"help": "v starts within ± this, unless at 0"})
    tinylora_dropout: float = field(default=0.0, metadata={"help": "dropout probability on the input of A"})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "the base stores (in, out), as Conv1D does"})
    bias: Literal["none", "all", "tinylora_only"] = field(default="none", metadata={"help": "base biases to train"})
    init_weights: bool | Literal["uniform"] = field(
        default=True, metadata={"help": "True: v = 0, the base model; 'uniform' or False: within ± init_v_bound"}
    )

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "r", 1)
        check_range(self, "u", 1)
        check_range(self, "weight_tying", 0, 1)
        check_range(self, "tinylora_dropout", 0, 1)


class TinyLora(Additive):
    """y + B(R(A x)) with R = Σ vᵢPᵢ. For an embedding BRA has the table's own layout, (vocabulary, dim)."""

    prefix = "tinylora_"
    kinds = ("linear", "embedding")
    converts = True

    tinylora_dropout = Mod(trainable=False)
    tinylora_A, tinylora_B = Buf(), Buf()  # (r, in), (out, r): √S·Vᵀ and U·√S of W
    tinylora_P = Buf()  # (u, r, r)
    tinylora_v = Mod(shared=True)  # {group of layers: (u,)}
    places_of = Val(shared=True)  # {layer key: (its index, its group)}
    r = Val()

    @classmethod
    def share(cls, c, layers, where):
        groups = max(1, round(len(layers) * (1 - c.weight_tying)))
        size = max(1, len(layers) // groups)
        places = {key: (i, str(min(i // size, groups - 1))) for i, key in enumerate(layers)}
        vectors = nn.ParameterDict()
        for group in dict.fromkeys(group for _, group in places.values()):
            v = torch.zeros(c.u, **where) if c.init_weights is True else torch.empty(c.u, **where)
            if c.init_weights is not True:  # False, too: upstream leaves it unset, which may be anything
                nn.init.uniform_(v, -c.init_v_bound, c.init_v_bound)
            vectors[group] = nn.Parameter(v)
        return {"tinylora_v": vectors, "places_of": places}

    @classmethod
    def unsaved(cls, c):
        return () if c.save_projection else ("tinylora_P",)

    def build(self, c, where):
        self.correct_layout(c)
        out, inp = self.stored_shape()
        self.r = r = min(c.r, out, inp)
        like = {"device": where["device"], "dtype": self.base_dtype}
        self.tinylora_A, self.tinylora_B = torch.empty(r, inp, **like), torch.empty(out, r, **like)
        if c.tinylora_dropout:
            self.tinylora_dropout = nn.Dropout(c.tinylora_dropout)

    def stored_shape(self):
        """(rows, columns) of BRA."""
        out, inp = self.layer.shape
        return (inp, out) if self.kind.name == "embedding" else (out, inp)

    def derive(self, c):
        generator = torch.Generator().manual_seed(c.projection_seed + self.places_of[self.key][0])
        P = torch.normal(0.0, self.r**-0.5, (c.u, self.r, self.r), generator=generator)
        self.tinylora_P = P.to(self.base_device)

    def reset(self, c):
        W = self.base_weight().float()
        U, S, Vh = torch.linalg.svd(W.T if self.kind.name == "embedding" else W, full_matrices=False)
        dtype = self.tinylora_A.dtype
        root = S[: self.r].to(dtype).sqrt()
        self.tinylora_A.copy_(root[:, None] * Vh[: self.r].to(dtype))
        self.tinylora_B.copy_(U[:, : self.r].to(dtype) * root)

    def mixing(self):
        """R, (r, r)."""
        v = self.tinylora_v[self.places_of[self.key][1]]
        return torch.tensordot(v, self.tinylora_P.to(v), 1)

    def low_rank(self):
        if self.kind.name != "linear":
            return None
        R = self.mixing()
        A, B = self.tinylora_A.to(R.dtype), self.tinylora_B.to(R.dtype)
        return LowRank(R @ A, B, 1.0, dropout_rate(self.tinylora_dropout))

    def output(self, x, y):
        if (f := self.low_rank()) is not None:
            return lowrank.add(self.base, y, x, f)
        R = self.mixing()
        rows = self.kind.lookup(self.base, x, self.tinylora_B.to(R.dtype))  # an embedding's x are indices: no dropout
        update = through(self.tinylora_dropout, rows) @ R @ self.tinylora_A.to(R.dtype)
        return y + self.kind.scaled(self.base, update).to(y.dtype)

    def delta_weight(self):
        R = self.mixing()
        delta = self.tinylora_B.to(R.dtype) @ R @ self.tinylora_A.to(R.dtype)
        return delta.T if self.kind.name == "embedding" else delta


TinyLoraLayer = layer_class("TinyLoraLayer", TinyLora)


class TinyLoraModel(Tuner):
    """A model with TinyLoRA adapters."""

    layer_cls = TinyLoraLayer
    target_module_mapping = LORA_TARGETS

    def check_new_config(self, adapter_name, config):
        super().check_new_config(adapter_name, config)
        if len({c.save_projection for c in self.configs_like(config)}) > 1:
            raise ConfigError("All TinyLoRA adapters of a model need the same save_projection.")


register("TINYLORA", TinyLoraConfig, tuner=TinyLoraModel, prefix="tinylora_")
