"""SuperTuning, W + S, or with r W + S + s·BA: the largest (or smallest) entries of W are trained (arXiv 2607.09287)."""

import math
import warnings
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from peft.config import ModulesConfig
from peft.core.adapter import Additive, Buf, Mod, Param, Val, dropout_rate
from peft.core.declare import layer_class, tuner_class
from peft.core.defaults import LORA_TARGETS
from peft.core.validate import check_range
from peft.enums import PeftType
from peft.errors import ConfigError, PeftWarning
from peft.ops import entries, lowrank
from peft.ops.lowrank import LowRank
from peft.registry import register


@dataclass
class SupertuningConfig(ModulesConfig):
    """Super (entries alone) or Supra (with r: entries and LoRA). Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.SUPERTUNING

    sparsity: float = field(default=0.99, metadata={"help": "the part of W's entries that is not trained"})
    select_top: bool = field(default=True, metadata={"help": "train the largest entries, else the smallest"})
    r: int | None = field(default=None, metadata={"help": "rank of a LoRA beside the entries; None: there is none"})
    lora_alpha: float | None = field(default=None, metadata={"help": "its scaling times r; None: 2·r"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout probability on its input"})
    init_weights: bool = field(default=True, metadata={"help": "start as the base model, else at random"})
    save_precomputed_indices: bool = field(
        default=True, metadata={"help": "keep in the file which entries are trained; else the base must tell again"}
    )

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "sparsity", 0, 1)
        check_range(self, "lora_dropout", 0, 1)
        if self.sparsity == 1:
            raise ConfigError("SupertuningConfig.sparsity must be below 1, which would leave nothing to train.")
        if self.r is None and self.lora_alpha is not None:
            raise ConfigError("SupertuningConfig.lora_alpha needs r, the rank of the LoRA that it scales.")
        if self.r is not None:
            check_range(self, "r", 1)
            self.lora_alpha = 2 * self.r if self.lora_alpha is None else self.lora_alpha
            check_range(self, "lora_alpha")
        if not self.save_precomputed_indices:
            warnings.warn(
                "save_precomputed_indices=False: a file without indices is right only on bitwise the same base weights "
                "and the same kind of device, as entries of equal size may come in another order.",
                PeftWarning,
                stacklevel=3,
            )


class Supertuning(Additive):
    """y + S x + s·B(A(dropout(x))), with S zero but for the entries."""

    prefix = "supertuning_"
    rounds = True  # like any weight that is trained itself

    supertuning_lora_dropout = Mod(trainable=False)
    supertuning_values = Param()  # (entries,)
    supertuning_indices = Buf()  # (entries,), int32: places in the flattened W, by size
    supertuning_lora_A, supertuning_lora_B = Mod(), Mod()  # in -> r, r -> out
    supertuning_rank, supertuning_lora_alpha = Val(), Val()

    @classmethod
    def unsaved(cls, c):
        return () if c.save_precomputed_indices else ("supertuning_indices",)

    @classmethod
    def from_file(cls, c, tensors, adapters):
        ending = ".supertuning_indices"
        if not c.save_precomputed_indices:
            return {k: t for k, t in tensors.items() if not k.endswith(ending)}
        return entries.checked(tensors, ending, {a.key: a.layer.shape for a in adapters})

    def build(self, c, where):
        count = int(math.prod(self.layer.shape) * (1 - c.sparsity))
        if not count:
            raise ConfigError(
                f"SupertuningConfig.sparsity={c.sparsity} leaves none of the {math.prod(self.layer.shape)} entries of "
                f"{self.key} to train. Lower it, or take the layer out of target_modules."
            )
        self.bags = entries.Bags()
        self.supertuning_values = nn.Parameter(torch.empty(count, **where))
        self.supertuning_indices = torch.empty(count, **{**where, "dtype": torch.int32})
        self.supertuning_rank, self.supertuning_lora_alpha = c.r or 0, float(c.lora_alpha or 0)
        if c.r is not None:
            if c.lora_dropout:
                self.supertuning_lora_dropout = nn.Dropout(c.lora_dropout)
            self.supertuning_lora_A, self.supertuning_lora_B = self.kind.factors(self.base, c.r, False, **where)

    def derive(self, c):
        if not c.save_precomputed_indices:
            self.supertuning_indices = self._chosen(c)

    def reset(self, c):
        self.supertuning_indices.copy_(self._chosen(c))
        if c.init_weights:
            self.supertuning_values.zero_()
        else:
            self.supertuning_values.normal_()
        if c.r is not None:
            nn.init.kaiming_uniform_(self.supertuning_lora_A.weight, a=math.sqrt(5))
            if c.init_weights:
                self.supertuning_lora_B.weight.zero_()
            else:
                nn.init.kaiming_uniform_(self.supertuning_lora_B.weight, a=math.sqrt(5))

    def _chosen(self, c):
        """The entries of W to train; in W's own dtype, so that ties fall as they do upstream."""
        size = self.base_weight().abs().flatten()
        return size.topk(len(self.supertuning_values), largest=c.select_top).indices.int()

    def remakes(self):
        return 0.0

    def lora(self):
        """The pair of factors, or None."""
        if not self.supertuning_rank:
            return None
        p = dropout_rate(self.supertuning_lora_dropout)
        scale = self.supertuning_lora_alpha / self.supertuning_rank
        return LowRank(self.supertuning_lora_A.weight, self.supertuning_lora_B.weight, scale, p)

    def aside(self):
        """The LoRA where it has dropout of its own, or would be rounded away in a weight of half precision."""
        lora = self.lora()
        return lora if lora is not None and (lora.dropout or self.base_dtype.itemsize < 4) else None

    def remade_weight(self, W):
        return self.with_entries(W) if self.aside() is not None else self.merged_weight(W)

    def with_entries(self, W):
        return entries.put(W, self.supertuning_indices, self.supertuning_values)

    def output(self, x, y):
        values = self.supertuning_values
        y = y + entries.output(x, self.layer.shape, self.supertuning_indices, values, self.bags).to(y.dtype)
        return y if (lora := self.lora()) is None else lowrank.add(self.base, y, x, lora)

    def beside(self, x, y, y0):
        return self.output(x, y)

    def delta_weight(self):
        S = entries.dense(self.layer.shape, self.supertuning_indices, self.supertuning_values)
        return S if (lora := self.lora()) is None else torch.addmm(S, lora.B, lora.A, alpha=lora.s)

    def merged_weight(self, W):
        W = self.with_entries(W)
        return W if (lora := self.lora()) is None else torch.addmm(W, lora.B.to(W), lora.A.to(W), alpha=lora.s)


SupertuningLayer = layer_class("SupertuningLayer", Supertuning)
SupertuningModel = tuner_class("SupertuningModel", SupertuningLayer, LORA_TARGETS)
register("SUPERTUNING", SupertuningConfig, tuner=SupertuningModel, prefix="supertuning_")
