"""VB-LoRA, W + BA where A and B are mixtures of a few vectors of one bank that all layers share (arXiv 2405.15179)."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn

from peft.config import TargetConfig
from peft.core.adapter import Mod, Param, Val, dropout_rate
from peft.core.checkpoint import get_peft_model_state_dict
from peft.core.declare import layer_class
from peft.core.defaults import VBLORA_TARGETS
from peft.core.tuner import Tuner
from peft.core.validate import check_range
from peft.enums import PeftType
from peft.errors import AdapterMismatchError, CheckpointError, ConfigError
from peft.methods.factored import Factored
from peft.ops.lowrank import LowRank
from peft.registry import register

ABSENT = -1e4  # logit of a vector that a top-k file leaves out: less than training ever gives, and finite in float16
INDICES, WEIGHTS = "_topk_indices", "_topk_weights"  # endings of a top-k file's keys


@dataclass
class VBLoRAConfig(TargetConfig):
    """VB-LoRA on linear layers. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.VBLORA

    r: int = field(default=4, metadata={"help": "rank of A and B"})
    num_vectors: int = field(default=256, metadata={"help": "vectors in the bank"})
    vector_length: int = field(default=256, metadata={"help": "their length, which divides the layers' widths"})
    topk: int = field(default=2, metadata={"help": "vectors in a mixture"})
    save_only_topk_weights: bool = field(
        default=False, metadata={"help": "files hold the mixtures only: much smaller, but training cannot go on"}
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
        check_range(self, "topk", high=self.num_vectors)
        check_range(self, "vblora_dropout", 0, 1)


class VBLoRA(Factored):
    """A part of a row of A, or of a column of B, is the mixture of the k vectors with the largest logits there."""

    prefix = "vblora_"
    converts = True

    vblora_dropout = Mod(trainable=False)
    vblora_logits_A = Param()  # (r, parts of the input, num_vectors)
    vblora_logits_B = Param()  # (parts of the output, r, num_vectors)
    vblora_vector_bank = Param(shared=True)  # (num_vectors, vector_length)
    r, topk, complete = Val(), Val(), Val()  # complete: True once the logits are known to be more than a top-k file's

    @classmethod
    def share(cls, c, layers, where):
        bank = torch.empty(c.num_vectors, c.vector_length, **where)
        return {"vblora_vector_bank": nn.Parameter(bank.uniform_(-c.init_vector_bank_bound, c.init_vector_bank_bound))}

    @classmethod
    def to_file(cls, c, tensors):
        if not c.save_only_topk_weights:
            return tensors
        kept = {}
        for key, value in tensors.items():
            if key.endswith(("vblora_logits_A", "vblora_logits_B")):
                top, indices = value.to("cpu", torch.float64).topk(c.topk, dim=-1)  # a copy of a copy is equal
                kept[key + INDICES] = indices.to(value.device, index_dtype(c.num_vectors))
                kept[key + WEIGHTS] = top.softmax(-1)[..., :-1].to(value).contiguous()  # the last is what is left of 1
            else:
                kept[key] = value
        return kept

    @classmethod
    def from_file(cls, c, tensors, adapters):
        for a in adapters:
            a.complete = False  # look again
        whole = {k: t for k, t in tensors.items() if not k.endswith((INDICES, WEIGHTS))}
        for key in [k.removesuffix(INDICES) for k in tensors if k.endswith(INDICES)]:
            whole[key] = logits(key, tensors[key + INDICES], tensors.get(key + WEIGHTS), c.num_vectors)
        return whole

    def build(self, c, where):
        self.correct_layout(c)
        self.r, self.topk = c.r, c.topk
        out, inp = self.layer.shape
        for name, width in (("in_features", inp), ("out_features", out)):
            if width % c.vector_length:
                raise ConfigError(f"vector_length={c.vector_length} must divide {name}={width} of {self.key}.")
        if c.vblora_dropout:
            self.vblora_dropout = nn.Dropout(c.vblora_dropout)
        parts = inp // c.vector_length, out // c.vector_length
        self.vblora_logits_A = nn.Parameter(torch.empty(c.r, parts[0], c.num_vectors, **where))
        self.vblora_logits_B = nn.Parameter(torch.empty(parts[1], c.r, c.num_vectors, **where))

    def reset(self, c):
        self.vblora_logits_A.normal_(0, c.init_logits_std)
        self.vblora_logits_B.normal_(0, c.init_logits_std)

    def factors(self):
        """A (r, in) and B (out, r)."""
        if self.training and not self.complete and not torch.compiler.is_compiling():
            self.check_complete()
        A, B = self.mixtures(self.vblora_logits_A), self.mixtures(self.vblora_logits_B)
        return A.flatten(1), B.transpose(1, 2).flatten(0, 1)

    def mixtures(self, logits):
        """(..., num_vectors) -> (..., vector_length)."""
        top, indices = logits.topk(self.topk, dim=-1)
        weights = top.softmax(-1).unsqueeze(-2)
        return (weights @ F.embedding(indices, self.vblora_vector_bank)).squeeze(-2)

    def check_complete(self):
        if (self.vblora_logits_A[0, 0] <= ABSENT).any():
            raise AdapterMismatchError(
                f"Adapter {self.name!r} was loaded from a file with save_only_topk_weights=True, which holds the "
                "mixtures but not the logits that training needs. Call model.eval(), or load a file with all logits."
            )
        self.complete = True

    def low_rank(self):
        return LowRank(*self.factors(), 1.0, dropout_rate(self.vblora_dropout))


def index_dtype(num_vectors):
    """The smallest dtype for indices of that many vectors; int16 from 256 on, for there is no signed byte of use."""
    sizes = {torch.uint8: 8, torch.int16: 15, torch.int32: 31}
    return next((dtype for dtype, bits in sizes.items() if num_vectors < 1 << bits), torch.int64)


def logits(key, indices, weights, num_vectors):
    """Logits that give these mixtures: (..., k) indices and (..., k - 1) weights -> (..., num_vectors)."""
    fits = weights is not None and weights.shape == (*indices.shape[:-1], indices.shape[-1] - 1)
    indices = indices.long()
    if not fits or (indices.numel() and not 0 <= indices.min() <= indices.max() < num_vectors):
        raise CheckpointError(
            f"{key}{INDICES} does not fit {key}{WEIGHTS} (one less for each mixture) or num_vectors={num_vectors}. The "
            "file is damaged or not this config's; nothing was loaded."
        )
    weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)
    found = weights.clamp(min=torch.finfo(weights.dtype).tiny).to("cpu", torch.float64).log()
    found = (found - found[..., :1]).to(weights)  # logits near 0 have more digits
    empty = torch.full((*indices.shape[:-1], num_vectors), ABSENT, dtype=weights.dtype, device=weights.device)
    return empty.scatter_(-1, indices, found)


VBLoRALayer = layer_class("VBLoRALayer", VBLoRA)


class VBLoRAModel(Tuner):
    """A model with VB-LoRA adapters."""

    layer_cls = VBLoRALayer
    target_module_mapping = VBLORA_TARGETS

    def get_nb_savable_parameters(self, adapter="default"):
        """(numbers of VB-LoRA, other numbers) in a file of the adapter; indices count by their size in float32."""
        counts = [0, 0]
        for key, t in get_peft_model_state_dict(self, adapter_name=adapter).items():
            counts["vblora_" not in key] += t.numel() * (1 if t.is_floating_point() else t.itemsize / 4)
        return tuple(map(round, counts))

    def print_savable_parameters(self):
        """Print how many numbers a file of the active adapter holds."""
        own, others = self.get_nb_savable_parameters(self.active_adapters[0])
        print(f"parameters in a file, as float32: {own:,d} of VB-LoRA, {own + others:,d} in all")


register("VBLORA", VBLoRAConfig, tuner=VBLoRAModel, prefix="vblora_")
