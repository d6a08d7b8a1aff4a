"""VB-LoRA, W + BA where A and B are made of vectors from one bank that all layers share (arXiv 2405.15179)."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn

from peft.config import TargetConfig
from peft.core.adapter import Additive, Mod, Param, Val
from peft.core.defaults import VBLORA_TARGETS
from peft.core.layer import AdapterLayer
from peft.core.tuner import Tuner
from peft.core.validate import check_range
from peft.enums import PeftType
from peft.errors import CheckpointError, ConfigError
from peft.ops import lowrank
from peft.ops.lowrank import LowRank
from peft.registry import register

ABSENT = torch.finfo(torch.float32).min  # the logit of a vector that a top-k file does not name
INDICES, WEIGHTS = "_topk_indices", "_topk_weights"


@dataclass
class VBLoRAConfig(TargetConfig):
    """VB-LoRA on linear layers. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.VBLORA

    r: int = field(default=4, metadata={"help": "rank of A and B"})
    num_vectors: int = field(default=256, metadata={"help": "vectors in the bank"})
    vector_length: int = field(default=256, metadata={"help": "their length, a divisor of the layers' sizes"})
    topk: int = field(default=2, metadata={"help": "vectors that are mixed for each piece of A and B"})
    save_only_topk_weights: bool = field(
        default=False, metadata={"help": "a small file of what is mixed, which cannot be trained any further"}
    )
    vblora_dropout: float = field(default=0.0, metadata={"help": "dropout probability on the input of A"})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "the base stores (in, out), as Conv1D does"})
    bias: Literal["none", "all", "vblora_only"] = field(default="none", metadata={"help": "base biases to train"})
    init_vector_bank_bound: float = field(default=0.02, metadata={"help": "the bank starts within ± this"})
    init_logits_std: float = field(default=0.1, metadata={"help": "standard deviation of the first logits"})

    def __post_init__(self):
        super().__post_init__()
        for name in ("r", "num_vectors", "vector_length", "topk"):
            check_range(self, name, 1)
        check_range(self, "vblora_dropout", 0, 1)
        if self.topk > self.num_vectors:
            raise ConfigError(f"VBLoRAConfig.topk={self.topk} is more than num_vectors={self.num_vectors}.")


class VBLoRA(Additive):
    """Each piece of A and B, vector_length long, is a softmax mixture of the topk vectors with the largest logits."""

    prefix = "vblora_"

    vblora_dropout = Mod(trainable=False)
    vblora_logits_A, vblora_logits_B = Param(), Param()  # (r, in / length, vectors), (out / length, r, vectors)
    vblora_vector_bank = Param(shared=True)  # (vectors, length)
    r, topk = Val(), Val()

    incomplete = False  # True: most logits are gone, for they came from a small file

    @classmethod
    def share(cls, c, layers, where):
        bank = torch.empty(c.num_vectors, c.vector_length, **where)
        bound = c.init_vector_bank_bound
        return {"vblora_vector_bank": nn.Parameter(bank.uniform_(-bound, bound))}

    def build(self, c, where):
        out, inp = self.layer.shape
        if out % c.vector_length or inp % c.vector_length:
            raise ConfigError(
                f"VBLoRAConfig.vector_length={c.vector_length} must divide both sides of {self.key}, {out} x {inp}."
            )
        self.r, self.topk = c.r, c.topk
        if c.vblora_dropout:
            self.vblora_dropout = nn.Dropout(c.vblora_dropout)
        self.vblora_logits_A = nn.Parameter(torch.empty(c.r, inp // c.vector_length, c.num_vectors, **where))
        self.vblora_logits_B = nn.Parameter(torch.empty(out // c.vector_length, c.r, c.num_vectors, **where))

    def reset(self, c):
        self.vblora_logits_A.normal_(0, c.init_logits_std)
        self.vblora_logits_B.normal_(0, c.init_logits_std)

    def pieces(self, logits):
        """(..., length) for logits (..., vectors)."""
        best, chosen = logits.topk(self.topk, dim=-1)
        return (best.softmax(-1).unsqueeze(-2) @ self.vblora_vector_bank[chosen].to(best.dtype)).squeeze(-2)

    def factors(self):
        """A (r, in) and B (out, r)."""
        A, B = self.pieces(self.vblora_logits_A), self.pieces(self.vblora_logits_B)
        return A.flatten(1), B.transpose(1, 2).flatten(0, 1)

    def low_rank(self):
        if self.incomplete and self.training:
            raise RuntimeError(
                f"Adapter {self.name!r} was saved with save_only_topk_weights=True: most of its logits are gone, so it "
                "cannot be trained. Use model.eval(), or go on from a checkpoint that was saved without it."
            )
        drop = self.vblora_dropout
        return LowRank(*self.factors(), 1.0, drop.p if drop is not None and drop.training else 0.0)

    def output(self, x, y):
        return lowrank.add(self.base, y, x, self.low_rank())

    def delta_weight(self):
        A, B = self.factors()
        return B @ A

    # -- files -----------------------------------------------------------------------------------------------------
    @classmethod
    def to_file(cls, c, tensors):
        """With save_only_topk_weights: which vectors, and all their weights but the last, which follows."""
        if not c.save_only_topk_weights:
            return tensors
        kept = {k: t for k, t in tensors.items() if "vblora_logits" not in k}
        for key in (k for k in tensors if k not in kept):
            logits, indices = tensors[key].topk(c.topk)
            kept[key + INDICES] = indices.to(index_dtype(c.num_vectors))
            kept[key + WEIGHTS] = logits.softmax(-1)[..., :-1].contiguous()
        return kept

    @classmethod
    def from_file(cls, c, tensors, adapters):
        if not c.save_only_topk_weights:
            return tensors
        whole = {k: t for k, t in tensors.items() if not k.endswith((INDICES, WEIGHTS))}
        for key in (k.removesuffix(INDICES) for k in tensors if k.endswith(INDICES)):
            if key + WEIGHTS not in tensors:
                raise CheckpointError(f"The file has {key + INDICES!r} but no {key + WEIGHTS!r}: it is damaged.")
            indices, weights = tensors[key + INDICES].long(), tensors[key + WEIGHTS]
            weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)
            logits = weights.new_full((*indices.shape[:-1], c.num_vectors), ABSENT)
            for adapter in adapters:
                adapter.incomplete = True
            whole[key] = logits.scatter(-1, indices.clamp(0, c.num_vectors - 1), weights.log().clamp(min=ABSENT / 4))
        return whole


def index_dtype(count):
    """The smallest dtype that counts so far."""
    return next((d for d, bits in ((torch.uint8, 8), (torch.int16, 15), (torch.int32, 31)) if count < 2**bits), torch.int64)


class VBLoRALayer(AdapterLayer):
    """A base layer with VB-LoRA adapters."""

    adapter_cls = VBLoRA

    def supports_lora_conversion(self, adapter_name="default"):
        return True


class VBLoRAModel(Tuner):
    """A model with VB-LoRA adapters."""

    layer_cls = VBLoRALayer
    target_module_mapping = VBLORA_TARGETS

    def get_nb_savable_parameters(self, adapter="default"):
        """(numbers of this method, other trained numbers) that a file holds; small indices count as parts of one."""
        config = self.peft_config[adapter]
        logits = bank = others = 0
        for name, p in self.named_parameters():
            if "vblora_logits" in name and f".{adapter}" in name:
                logits += p.numel()
            elif "vblora_vector_bank" in name and f".{adapter}" in name:
                bank += p.numel()
            elif p.requires_grad:
                others += p.numel()
        if config.save_only_topk_weights:
            mixtures = logits // config.num_vectors
            size = index_dtype(config.num_vectors).itemsize / 4
            logits = int(mixtures * (config.topk - 1) + mixtures * config.topk * size)
        return bank + logits, others

    def print_savable_parameters(self):
        """Print how many numbers a file holds."""
        own, others = self.get_nb_savable_parameters()
        print(f"VB-LoRA params to-be-saved (float32-equivalent): {own:,d} || total params to-be-saved: {own + others:,d}")


register("VBLORA", VBLoRAConfig, tuner=VBLoRAModel, prefix="vblora_")
