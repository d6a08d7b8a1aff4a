"""Compacter's projections: W = Σᵢ (ruleᵢ ⊗ termᵢ)ᵀ, rules and terms full or of low rank (arXiv 2106.04647)."""

import torch
from torch import nn

from peft.errors import ConfigError


class Stack(nn.Module):
    """n matrices (a, b): `weight` (n, a, b), or with a rank `left` (n, a, rank) and `right` (n, rank, b)."""

    def __init__(self, n, a, b, rank, **where):
        super().__init__()
        if rank:
            self.left = nn.Parameter(torch.empty(n, a, rank, **where))
            self.right = nn.Parameter(torch.empty(n, rank, b, **where))
        else:
            self.weight = nn.Parameter(torch.empty(n, a, b, **where))

    def matrices(self):
        """(n, a, b)."""
        return self.weight if "weight" in self._parameters else self.left @ self.right

    @torch.no_grad()
    def fill(self, variance):
        """Random entries of the product of about this variance."""
        if "weight" in self._parameters:
            self.weight.normal_(0, variance**0.5)
        else:
            for factor in (self.left, self.right):
                factor.normal_(0, (variance / self.left.shape[-1]) ** 0.25)

    @torch.no_grad()
    def zero(self):
        """Make the product zero, but let training move it."""
        self.fill(1)
        (self.weight if "weight" in self._parameters else self.right).zero_()


def rule(c, where):
    """The uninitialised rules, n matrices of n × n."""
    return Stack(c.phm_dim, c.phm_dim, c.phm_dim, c.phm_rule_rank, **where)


def terms(c, inp, out, key, where):
    """The uninitialised terms of a projection from `inp` to `out` features."""
    n = c.phm_dim
    if inp % n or out % n:
        raise ConfigError(
            f"phm_dim={n} must divide both sides of a projection, but on {key} one is from {inp} to {out} features. "
            "Choose another phm_dim, reduction_factor or bottleneck_size."
        )
    return Stack(n, inp // n, out // n, c.phm_rank, **where)


def kronecker(rules, terms):
    """Rules (n, n, n) and terms (n, in / n, out / n) -> the weight (out, in)."""
    n, a, b = terms.shape
    return torch.einsum("kij,kab->jbia", rules, terms).reshape(n * b, n * a)
