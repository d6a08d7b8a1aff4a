"""Invertible maps of hidden states: additive (NICE, 1410.8516) and affine coupling (RealNVP, 1605.08803; Glow)."""

import torch
import torch.nn.functional as F
from torch import nn

from peft.layers.linear import linear
from peft.ops.bottleneck import ACTIVATIONS


class Coupling(nn.Module):
    """(a, b) -> (a', b'): a' = e(s₁(b))·a + t₁(b), b' = e(s₂(a'))·b + t₂(a'); additive: without the factors e.

    Each t (and s) comes of a two-layer network; e is between ½ and 2, so that the inverse is well-conditioned.
    """

    def __init__(self, width, reduction_factor, non_linearity, affine, **where):
        super().__init__()
        half = width // 2
        size = max(1, int(half // reduction_factor))
        self.affine, self.non_linearity = affine, non_linearity
        out = half * (2 if affine else 1)
        self.first_down, self.first_up = linear(half, size, True, **where), linear(size, out, True, **where)
        self.second_down, self.second_up = linear(half, size, True, **where), linear(size, out, True, **where)

    def forward(self, x):
        a, b = x.chunk(2, -1)
        a = self._couple(a, self.first_down, self.first_up, b)
        b = self._couple(b, self.second_down, self.second_up, a)
        return torch.cat([a, b], -1)

    def inverse(self, x):
        """The x whose `forward` this is."""
        a, b = x.chunk(2, -1)
        b = self._uncouple(b, self.second_down, self.second_up, a)
        a = self._uncouple(a, self.first_down, self.first_up, b)
        return torch.cat([a, b], -1)

    def _couple(self, a, down, up, b):
        factor, shift = self._network(down, up, b)
        return a + shift if factor is None else a * factor + shift

    def _uncouple(self, a, down, up, b):
        factor, shift = self._network(down, up, b)
        return a - shift if factor is None else (a - shift) / factor

    def _network(self, down, up, b):
        h = F.linear(b, down.weight.to(b.dtype), down.bias.to(b.dtype))
        h = F.linear(ACTIVATIONS[self.non_linearity](h), up.weight.to(b.dtype), up.bias.to(b.dtype))
        if not self.affine:
            return None, h
        scale, shift = h.chunk(2, -1)
        return torch.exp2(torch.tanh(scale)), shift
