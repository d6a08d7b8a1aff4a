"""BOFT, the input rotated by a product of butterfly factors, the output scaled by s (arXiv 2311.06243)."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from peft.config import TargetConfig
from peft.core.adapter import Param, Val
from peft.core.declare import layer_class, tuner_class
from peft.core.defaults import LORA_TARGETS
from peft.core.validate import check_range
from peft.enums import PeftType
from peft.errors import ConfigError
from peft.methods.orthogonal import Rotation, cayley, rotate_blocks
from peft.registry import register

DENSE = 64  # factors that stay within groups of this many inputs are multiplied out before they meet x


@dataclass
class BOFTConfig(TargetConfig):
    """BOFT on linear layers and convolutions. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.BOFT

    boft_block_size: int = field(default=4, metadata={"help": "size of a block; set it or boft_block_num, the other 0"})
    boft_block_num: int = field(default=0, metadata={"help": "number of blocks of a layer"})
    boft_n_butterfly_factor: int = field(default=1, metadata={"help": "number of factors; each mixes twice as widely"})
    boft_dropout: float = field(default=0.0, metadata={"help": "share of a factor's blocks that rest in training"})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "kept for files; the layer's own layout counts"})
    bias: str = field(default="none", metadata={"help": "base biases to train: none, all or boft_only"})
    init_weights: bool = field(default=True, metadata={"help": "start as the base model, else at random"})

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "boft_block_size", 0)
        check_range(self, "boft_block_num", 0)
        check_range(self, "boft_n_butterfly_factor", 1)
        check_range(self, "boft_dropout", 0, 1)
        if (self.boft_block_size == 0) == (self.boft_block_num == 0):
            raise ConfigError(
                "BOFTConfig needs one of boft_block_size and boft_block_num, and 0 for the other, got "
                f"{self.boft_block_size} and {self.boft_block_num}: their product is the number of inputs."
            )
        if self.bias not in ("none", "all", "boft_only"):
            raise ConfigError(f"BOFTConfig.bias must be one of 'none', 'all', 'boft_only', got {self.bias!r}.")


class BOFT(Rotation):
    """s∘W(x M) + b for row vectors x, M = B_{m-1}···B_0; factor i works within groups of b·2ⁱ inputs."""

    prefix = "boft_"

    boft_R = Param()  # (factors, blocks, b, b); its skew-symmetric part counts
    boft_s = Param()  # (out, 1), for a convolution (1, out)
    boft_block_size, boft_block_num = Val(), Val()

    def build(self, c, where):
        self.refuse_groups()
        b = c.boft_block_size or self.width // c.boft_block_num
        m = c.boft_n_butterfly_factor
        group = b << (m - 1)
        if not b or self.width % group or (m > 1 and b % 2) or (c.boft_block_num and self.width % c.boft_block_num):
            raise ConfigError(
                f"boft_block_size={c.boft_block_size}, boft_block_num={c.boft_block_num} and boft_n_butterfly_factor="
                f"{m} do not fit the {self.width} inputs of {self.key}: they must be a multiple of block size · "
                "2^(factors - 1), and with more than one factor the block size must be even."
            )
        self.boft_block_size, self.boft_block_num = b, self.width // b
        self.boft_R = nn.Parameter(torch.empty(m, self.boft_block_num, b, b, **where))
        out = self.layer.shape[0]
        self.boft_s = nn.Parameter(torch.empty((out, 1) if self.kind.name == "linear" else (1, out), **where))

    def reset(self, c):
        if c.init_weights:
            self.boft_R.zero_()
            self.boft_s.fill_(1)
        else:
            self.boft_R.normal_(std=0.1)
            self.boft_s.normal_(mean=1, std=0.1)

    @classmethod
    def from_file(cls, c, tensors, adapters):
        """Upstream trains one factor, whatever the config says, where its CUDA kernel is missing."""
        for adapter in adapters:
            R = adapter.boft_R
            keys = (f"{prefix}{adapter.key}.boft_R" for prefix in ("base_model.model.", ""))
            held = next((tensors[k] for k in keys if k in tensors), R)
            if held.ndim == 4 and len(held) == 1 < len(R):
                adapter.boft_R = nn.Parameter(R[:1].detach().clone(), R.requires_grad)
        return tensors

    def factors(self):
        """(factors, blocks, b, b), orthogonal."""
        R = self.boft_R
        Q = (R - R.mT) / 2
        if self.config.boft_dropout and self.training:
            m, k = R.shape[:2]
            resting = torch.randperm(k, device=R.device)[: int(self.config.boft_dropout * k)]
            acts = torch.ones(m, k, 1, 1, dtype=R.dtype, device=R.device)
            acts[torch.randint(m, (1,), device=R.device), resting] = 0
            Q = Q * acts
        return cayley(Q)

    def turn(self, x, back=False):
        factors = self.factors()
        m, k, b, _ = factors.shape
        group = b << (m - 1)
        if group > DENSE:
            return butterfly(x, factors.to(x.dtype), back)
        M = factors[0]
        if m > 1:  # what the factors make of each unit vector: one row of the blocks of their product
            units = torch.eye(group, dtype=M.dtype, device=M.device).repeat(1, k * b // group)
            M = butterfly(units, factors).unflatten(-1, (-1, group)).transpose(0, 1)
        return rotate_blocks(x, (M.mT if back else M).to(x.dtype))

    @property
    def scale(self):
        return self.kind.per_out(self.boft_s.flatten())

    def output(self, x, y):
        y = super().output(x, y)
        if not self.by_input:
            return y
        bias = getattr(self.base, "bias", None)
        if bias is None:
            return (y * self.scale).to(y.dtype)
        return torch.addcmul(self.kind.per_out(bias) * (1 - self.scale), y, self.scale).to(y.dtype)

    def merged_weight(self, W):
        return super().merged_weight(W) * self.boft_s.view(-1, *[1] * (W.ndim - 1))


def butterfly(x, factors, back=False):
    """Row vectors x times B_{m-1}···B_0 (back: times the inverse). A block's halves lie b/2·2ⁱ apart in factor i."""
    m, _, b, _ = factors.shape
    for i in range(m) if back else reversed(range(m)):
        halves = x.unflatten(-1, (-1, 2, 1 << i, b // 2)) if i else x
        z = halves.transpose(-3, -2).reshape(x.shape) if i else x
        z = rotate_blocks(z, factors[i].mT if back else factors[i])
        x = z.unflatten(-1, (-1, 1 << i, 2, b // 2)).transpose(-3, -2).reshape(x.shape) if i else z
    return x


BOFTLayer = layer_class("BOFTLayer", BOFT)
BOFTModel = tuner_class("BOFTModel", BOFTLayer, LORA_TARGETS)
register("BOFT", BOFTConfig, tuner=BOFTModel, prefix="boft_")
