"""HRA: what the laws do not cover."""

from __future__ import annotations

import models
import pytest
import torch
from torch import nn

import peft


def wrapped(base=None, **config):
    base = models.build("mlp") if base is None else base
    return peft.get_peft_model(base, peft.HRAConfig(**{"target_modules": ["lin0"], **config}))


@pytest.mark.parametrize("config", [{"r": 5}, {"r": 4, "apply_GS": True}], ids=str)
def test_what_cannot_start_as_the_base_says_so_and_starts_finite(config):
    """Upstream starts from NaN with apply_GS: equal vectors have nothing left to make orthogonal."""
    with pytest.warns(UserWarning, match="cannot start as the base model; lin0"):
        model = wrapped(**config)
    x = models.noise((4, 16), 1)
    y = model(x)
    y.sum().backward()
    assert y.isfinite().all() and not torch.allclose(y, models.build("mlp")(x), atol=1e-2)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("apply_GS", [False, True])
def test_the_chain_is_orthogonal(apply_GS):
    adapter = wrapped(r=4, apply_GS=apply_GS, init_weights=False).base_model.layers["lin0"].adapters["default"]
    M = adapter.turn(torch.eye(16))
    assert (M @ M.T - torch.eye(16)).abs().max() < 1e-5
    assert (adapter.turn(torch.eye(16), back=True) - M.T).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"r": 0}, "HRAConfig.r"),
        ({"bias": "some"}, "HRAConfig.bias"),
        ({"r": 18, "apply_GS": True}, "r of at most 16, the inputs of lin0"),
    ],
)
def test_what_does_not_fit_is_named(config, names):
    with pytest.raises(ValueError, match=names):
        wrapped(**config)


def test_grouped_convolutions_are_refused_by_name():
    with pytest.raises(ValueError, match="cannot adapt 0: it is a convolution with groups"):
        wrapped(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), target_modules=["0"])
