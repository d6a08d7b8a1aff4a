"""What the laws run over: small bases, and examples of methods on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import models
import torch
from models import WIDTH, noise
from torch import nn


class Wrap(nn.Module):
    """One layer called `layer`, and a linear head that keeps its output's gradients apart."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return torch.tanh(self.layer(x))


class Residual(nn.Module):
    """norm(x + W norm(x)), a block of a transformer at its smallest, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.lin0, self.after = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.lin1 = nn.Linear(WIDTH, 5)

    def forward(self, x):
        return self.lin1(self.after(x + self.lin0(self.before(x))))


def conv1d_transposed() -> nn.Module:
    """transformers' Conv1D, whose weight is stored (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return Wrap(Conv1D(12, WIDTH))


IDS = torch.tensor([[0, 3, 7, 19], [5, 5, 1, 2], [9, 18, 0, 3]])
IMAGE = noise((3, 4, 6, 5), 7)
BASES: dict[str, tuple[Any, torch.Tensor]] = {
    "mlp": (models.Mlp, noise((6, WIDTH), 7)),
    "sequence": (models.Mlp, noise((3, 5, WIDTH), 7)),
    "no_bias": (lambda: Wrap(nn.Linear(WIDTH, 12, bias=False)), noise((6, WIDTH), 7)),
    "transposed": (conv1d_transposed, noise((3, 5, WIDTH), 7)),
    "conv1": (lambda: Wrap(nn.Conv1d(4, 6, 3, padding=1)), noise((3, 4, 8), 7)),
    "conv2": (lambda: Wrap(nn.Conv2d(4, 6, 3, padding=1, stride=2)), IMAGE),
    "conv3": (lambda: Wrap(nn.Conv3d(2, 3, (1, 3, 3), padding=(0, 1, 1))), noise((3, 2, 2, 4, 5), 7)),
    "grouped": (lambda: Wrap(nn.Conv2d(4, 8, 3, padding=1, groups=2)), IMAGE),
    "dilated": (lambda: Wrap(nn.Conv2d(4, 6, 3, padding=2, dilation=2)), IMAGE),
    "reflect": (lambda: Wrap(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")), IMAGE),
    "circular": (lambda: Wrap(nn.Conv1d(4, 6, 5, padding=2, padding_mode="circular")), noise((3, 4, 8), 7)),
    "same": (lambda: Wrap(nn.Conv2d(4, 6, (4, 3), padding="same")), IMAGE),
    "pointwise": (lambda: Wrap(nn.Conv2d(4, 6, 1, padding=1, stride=2)), IMAGE),
    "embedded": (models.Embedded, IDS),
    "attention": (models.Attention, noise((3, 5, WIDTH), 7)),
    "residual": (Residual, noise((3, 5, WIDTH), 7)),
    "parameters": (models.Parameters, noise((6, WIDTH), 7)),
}


@dataclass(frozen=True)
class Example:
    """One config on one base. `config`: arguments of the method's config class."""

    name: str
    base: str
    config: dict[str, Any]
    method: str = "LORA"
    identity: float | None = 0.0  # how far from the base it may be at first; None: it must differ
    merges: bool = True
    rows: bool = True  # a mixed batch is possible; else it is one uniform ValueError
    tolerance: float = 2e-6  # merged against unmerged, relative to the largest output, float32
    frozen: tuple[str, ...] = ()  # fields that are saved but not trained
    compiles: str = ""  # why it does not compile into one graph; "": it does
    projected: bool = False  # gradients are not those of the formula: the method takes a part of them away
    oracle: Callable | None = None  # writes into `state` what the tensors of a file make of `weights`; None: no formula
    several: bool = True  # two adapters of the method may act at once
    adds_bias: bool = False  # merging gives layers a bias that the base lacks
    casts: bool = True  # adapter weights of a half-precision base are float32 by default
    random: bool = False  # training draws at random, beside dropout
    dropout: str = ""  # the config's field with a dropout probability, if the example drops
    half: dict[str, float] = field(default_factory=dict)  # tolerances in half precision that are not the usual ones
    call: dict[str, Any] = field(default_factory=dict)  # further arguments of the forward
    second: dict[str, Any] = field(default_factory=dict)  # what the config of a second adapter must have otherwise

    def __str__(self) -> str:
        return self.name

    def make_config(self, **changes: Any) -> Any:
        """A fresh config."""
        from peft.registry import method

        return method(self.method).config(**{**self.config, **changes})

    def make_base(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The base model, the same at each call."""
        return models.fill(BASES[self.base][0]()).to(dtype)

    def inputs(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Its input."""
        x = BASES[self.base][1]
        return x.to(dtype, copy=True) if x.is_floating_point() else x
