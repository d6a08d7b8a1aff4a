"""VeLoRA: LoRA that keeps one number in place of each group of inputs for the gradient of A (arXiv 2405.17991)."""

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F

from peft.core.adapter import Buf
from peft.core.validate import check_fields, check_range
from peft.methods.lora.lora import Lora
from peft.ops import lowrank


@dataclass
class VeloraConfig:
    """How inputs are compressed between forward and backward."""

    num_groups: int = field(default=64, metadata={"help": "numbers kept of each token"})
    scale: float = field(default=1.0, metadata={"help": "factor on the inputs as they are rebuilt"})
    init_type: Literal["batch_average", "batch_average_once", "random"] = field(
        default="batch_average",
        metadata={"help": "the direction kept of a group: the mean of each batch, that of the first batch, or random"},
    )

    def __post_init__(self):
        check_fields(self)
        check_range(self, "num_groups", 1)
        check_range(self, "scale", above=0)


class Velora(Lora):
    """LoRA, but for the gradient of A in training: it sees each group g of inputs as scale·(v·g)v."""

    kinds = ("linear",)
    title = "VeLoRA"

    lora_velora_embed = Buf()  # v, (ceil(in / num_groups),), of length one; zero before the first training step
    started = False  # True: v is not to be set any more

    def build(self, c, where):
        super().build(c, where)
        self.lora_velora_embed = torch.empty(-(-self.layer.shape[1] // c.velora_config.num_groups), **where)

    def reset(self, c):
        super().reset(c)
        if c.velora_config.init_type == "random":
            self.lora_velora_embed.normal_()
            self.lora_velora_embed.copy_(F.normalize(self.lora_velora_embed.float(), dim=0))
        else:
            self.lora_velora_embed.zero_()

    def low_rank(self):
        return None if self.training and torch.is_grad_enabled() else super().low_rank()

    def output(self, x, y):
        f = super().low_rank()
        if self.low_rank() is not None:
            return lowrank.add(self.base, y, x, f)
        x = lowrank.input_of(x, f)
        h = CompressedLinear.apply(x, f.A.to(x.dtype), self._direction(x.detach()), self.config.velora_config.scale)
        more = F.linear(h * f.s, f.B.to(h.dtype), None if f.bias is None else (f.bias * f.s).to(h.dtype))
        return y + more.to(y.dtype)

    @torch.no_grad()
    def _direction(self, x):
        """v for a batch x (..., in)."""
        kept = self.lora_velora_embed
        if self.started or self.config.velora_config.init_type == "random":
            return kept
        mean = grouped(x.reshape(-1, x.shape[-1]).sum(0, dtype=torch.float32), len(kept)).sum(0)
        new = torch.where(mean.any(), mean, 1.0)
        new = (new / new.norm()).to(kept.dtype)
        if self.config.velora_config.init_type == "batch_average_once":
            self.started = True
            new = torch.where(kept.any(), kept, new)  # as it was loaded
        kept.copy_(new)
        return new


def grouped(x, size):
    """(..., in) as (..., groups, size), filled up with zeros."""
    missing = -x.shape[-1] % size
    return (F.pad(x, (0, missing)) if missing else x).unflatten(-1, (-1, size))


class CompressedLinear(torch.autograd.Function):
    """x Aᵀ, keeping only v·g of each group g of x for the gradient of A."""

    @staticmethod
    def forward(ctx, x, A, v, scale):
        v = v.to(x.dtype)
        ctx.save_for_backward(grouped(x.reshape(-1, x.shape[-1]), len(v)) @ v, A, v)
        ctx.scale = scale
        return F.linear(x, A)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        kept, A, v = ctx.saved_tensors
        kept, A = kept.to(g.dtype), A.to(g.dtype)  # autocast may have chosen another
        dx = g @ A if ctx.needs_input_grad[0] else None
        dA = None
        if ctx.needs_input_grad[1]:  # the inputs are never rebuilt: v is the same for all of them
            dA = (g.reshape(-1, g.shape[-1]).t() @ kept).mul_(ctx.scale).unsqueeze(-1) * v
            dA = dA.flatten(1)[:, : A.shape[1]]
        return dx, dA, None, None
