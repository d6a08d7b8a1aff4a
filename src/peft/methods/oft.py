"""OFT, the input rotated in blocks: y = W(Rᵀx), R block-diagonal and orthogonal (arXiv 2306.07280, 2506.19847)."""

import warnings
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from packaging.version import Version

from peft.config import TargetConfig
from peft.core.adapter import Mod, Val
from peft.core.declare import layer_class, tuner_class
from peft.core.defaults import LORA_TARGETS
from peft.core.validate import check_range
from peft.enums import PeftType
from peft.errors import CheckpointError, ConfigError
from peft.methods import orthogonal
from peft.methods.orthogonal import Rotation
from peft.registry import register

OTHER_SERIES = Version("0.18.0")  # releases before it sum another Neumann series


@dataclass
class OFTConfig(TargetConfig):
    """OFT on linear layers, convolutions and embeddings. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.OFT

    r: int = field(default=0, metadata={"help": "number of blocks in a layer; set it or oft_block_size, the other 0"})
    oft_block_size: int = field(default=32, metadata={"help": "size of a block"})
    module_dropout: float = field(default=0.0, metadata={"help": "probability that a block rests in a training step"})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "kept for files; the layer's own layout counts"})
    bias: Literal["none", "all", "oft_only"] = field(default="none", metadata={"help": "base biases to train"})
    init_weights: bool = field(default=True, metadata={"help": "start as the base model, else at random"})
    coft: bool = field(default=False, metadata={"help": "keep the rotation near the identity, within eps"})
    eps: float = field(default=6e-5, metadata={"help": "largest norm of all blocks' generators, with coft"})
    block_share: bool = field(default=False, metadata={"help": "one block serves in all places of a layer"})
    use_cayley_neumann: bool = field(default=True, metadata={"help": "a truncated series instead of an inverse"})
    num_cayley_neumann_terms: int = field(default=5, metadata={"help": "terms of the series"})

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "r", 0)
        check_range(self, "oft_block_size", 0)
        check_range(self, "module_dropout", 0, 1)
        check_range(self, "eps", 0)
        check_range(self, "num_cayley_neumann_terms", 1)
        if (self.r == 0) == (self.oft_block_size == 0):
            raise ConfigError(
                f"OFTConfig needs one of r and oft_block_size, and 0 for the other, got r={self.r} and oft_block_size="
                f"{self.oft_block_size}: their product is the number of inputs. With r, set oft_block_size=0."
            )

    @classmethod
    def check_kwargs(cls, **kwargs):
        """What a config file says, checked to be of a format that is known."""
        if "oft_block_size" not in kwargs:
            raise ConfigError(f"The config has no oft_block_size. {OLD_FORMAT}")
        version = Version((kwargs.get("peft_version") or "0").partition("@")[0])
        if kwargs.get("use_cayley_neumann") and version < OTHER_SERIES:
            warnings.warn(
                f"This OFT adapter was trained with peft {version} and use_cayley_neumann=True. Before {OTHER_SERIES} "
                "the series had other coefficients, so outputs will differ a little: check them, or train it again.",
                stacklevel=4,
            )
        return super().check_kwargs(**kwargs)


OLD_FORMAT = (
    "A peft before 0.16 wrote it, whose OFT had whole matrices `oft_r` of shape (blocks, b, b). To convert it, "
    "merge it there into the base model (merge_and_unload), or, if peft 0.14 or 0.15 wrote it and all of its `oft_s` "
    "are 1, store the values above the diagonal of (oft_r - oft_r.mT) / 2, row by row, as `oft_R.weight` of shape "
    "(blocks, b(b-1)/2), and set r=0, oft_block_size=b and use_cayley_neumann=False in adapter_config.json."
)


class OFT(Rotation):
    """x R for row vectors x, R from the Cayley transform of trained skew-symmetric blocks."""

    prefix = "oft_"
    kinds = ("linear", "conv", "embedding")

    oft_R, oft_embedding_R = Mod(), Mod()  # .weight (blocks, b(b-1)/2); one block with block_share
    r, oft_block_size = Val(), Val()

    def build(self, c, where):
        self.refuse_groups()
        if c.r:
            self.r = orthogonal.nearest_divisor(self.width, c.r, "r", self.key)
            self.oft_block_size = self.width // self.r
        else:
            self.oft_block_size = orthogonal.nearest_divisor(self.width, c.oft_block_size, "oft_block_size", self.key)
            self.r = self.width // self.oft_block_size
        module = orthogonal.skew_module(1 if c.block_share else self.r, self.oft_block_size, **where)
        if self.kind.name == "embedding":
            self.oft_embedding_R = module
        else:
            self.oft_R = module

    def reset(self, c):
        if c.init_weights:
            self.weight.zero_()
        else:
            self.weight.normal_(std=0.1)

    @property
    def weight(self):
        return (self.oft_R or self.oft_embedding_R).weight

    def blocks(self):
        """(blocks, b, b), orthogonal."""
        c, v = self.config, self.weight
        if c.coft:
            v = self.within_eps(v)
        if c.module_dropout and self.training:  # upstream makes the dropout and never applies it
            v = v * (torch.rand(len(v), 1, device=v.device) >= c.module_dropout)
        Q = orthogonal.skew(v, self.oft_block_size)
        return orthogonal.orthogonal(Q, c)

    def within_eps(self, v):
        """v with ‖Q‖ of each block at most eps/√blocks. In training the parameter itself is projected, as PGD asks."""
        learning = torch.is_grad_enabled() and v.requires_grad
        with torch.no_grad():
            norm = v.norm(dim=1, keepdim=True) * 2**0.5  # each value stands in Q twice
            bound = self.config.eps / len(v) ** 0.5
            projected = torch.where(norm > bound, v * (bound / norm), v)
            return v.copy_(projected) if learning else projected

    def turn(self, x, back=False):
        R = self.blocks()
        return orthogonal.rotate_blocks(x, (R.mT if back else R).to(x.dtype))

    @classmethod
    def from_file(cls, c, tensors, adapters):
        if old := [k for k in tensors if k.endswith((".oft_r", ".oft_s"))]:
            raise CheckpointError(f"The file has {old[0]!r}. {OLD_FORMAT}")
        return tensors


OFTLayer = layer_class("OFTLayer", OFT)
OFTModel = tuner_class("OFTModel", OFTLayer, LORA_TARGETS)
register("OFT", OFTConfig, tuner=OFTModel, prefix="oft_", mixed=True)
