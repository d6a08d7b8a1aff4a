"""BD-LoRA: A or B is block-diagonal, so that tensor-parallel ranks hold whole blocks (arXiv 2510.23346)."""

from dataclasses import dataclass, field

import torch
from torch import nn

from peft.core.validate import check_fields, check_range
from peft.errors import ConfigError
from peft.layers.linear import linear
from peft.methods.lora.lora import Lora


@dataclass
class BdLoraConfig:
    """Which layers have a block-diagonal A, and which a block-diagonal B. A name matches wherever it is in a path."""

    target_modules_bd_a: list[str] | None = field(
        default=None, metadata={"help": "parts of names of layers with a block-diagonal A"}
    )
    target_modules_bd_b: list[str] | None = field(
        default=None, metadata={"help": "parts of names of layers with a block-diagonal B"}
    )
    nblocks: int = field(default=1, metadata={"help": "number of blocks; divides r and the layer's width"})
    match_strict: bool = field(default=True, metadata={"help": "refuse targets that neither list names"})

    def __post_init__(self):
        check_fields(self)
        check_range(self, "nblocks", 1)

    def block_of(self, key):
        """Which of "A" and "B" is block-diagonal for the layer at `key`, or None. Raises ConfigError for both."""
        a, b = (any(t in key for t in names or ()) for names in (self.target_modules_bd_a, self.target_modules_bd_b))
        if a and b:
            raise ConfigError(
                f"target_modules_bd_a and target_modules_bd_b both match {key}; only one of A and B can have blocks."
            )
        if not (a or b) and self.match_strict:
            raise ConfigError(
                f"Neither target_modules_bd_a nor target_modules_bd_b matches the target {key}. Name it in one of "
                "them, or set match_strict=False to give it a plain LoRA."
            )
        return "A" if a else "B" if b else None


class BdLora(Lora):
    """Blocks are stored side by side: A (r, in / n) and B (out, r / n). A block-diagonal B has no bias."""

    kinds = ("linear",)
    title = "BD-LoRA"
    block = None  # which of A and B is block-diagonal

    def build(self, c, where):
        super().build(c, where)
        out, inp = self.layer.shape
        n = c.use_bdlora.nblocks
        if self.block == "A":
            self.lora_A = linear(inp // n, self.r, False, **where)
        elif self.block == "B":
            self.lora_B, self.lora_bias = linear(self.r // n, out, False, **where), False

    def _check_layer(self, c):
        super()._check_layer(c)
        n, (out, inp) = c.use_bdlora.nblocks, self.layer.shape
        self.block = c.use_bdlora.block_of(self.key)
        width = {"A": inp, "B": out}.get(self.block, 0)
        if self.block and (width % n or self.r % n):
            raise ConfigError(
                f"BdLoraConfig.nblocks={n} must divide r={self.r} and, for a block-diagonal {self.block}, the width "
                f"{width} of {self.key}."
            )
        if c.init_lora_weights not in (True, False, "gaussian"):
            raise ConfigError(
                f"init_lora_weights={c.init_lora_weights!r} fills whole factors; with use_bdlora use True, False or "
                "'gaussian'."
            )

    def reset(self, c):
        super().reset(c)
        if self.block == "A":
            nn.init.kaiming_uniform_(self.lora_A.weight)

    def effective_factors(self):
        """A (r, in) and B (out, r), with the zeros between their blocks."""
        A, B, n = self.lora_A.weight, self.lora_B.weight, self.config.use_bdlora.nblocks
        if self.block == "A":
            A = torch.block_diag(*A.chunk(n))
        elif self.block == "B":
            B = torch.block_diag(*B.chunk(n))
        return A, B

    def low_rank(self):
        return self.pair(*self.effective_factors(), self.lora_B.bias)
