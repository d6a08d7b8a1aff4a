"""BOFT: what the laws do not cover."""

from __future__ import annotations

import models
import pytest
import torch
from laws_table import gap, train_a_little
from torch import nn

import peft
from peft.methods import boft


def wrapped(base=None, **config):
    base = models.build("mlp") if base is None else base
    return peft.get_peft_model(base, peft.BOFTConfig(**{"target_modules": ["lin0"], **config}))


@pytest.mark.parametrize("factors", [1, 2, 3])
def test_wide_products_are_those_that_are_multiplied_out(factors, monkeypatch):
    model = wrapped(boft_block_size=4, boft_n_butterfly_factor=factors)
    train_a_little(model)
    adapter, x = model.base_model.layers["lin0"].adapters["default"], models.noise((3, 5, 16), 2)
    there, back = adapter.turn(x), adapter.turn(x, back=True)
    monkeypatch.setattr(boft, "DENSE", 1)
    assert gap(adapter.turn(x), there) < 2e-6 and gap(adapter.turn(x, back=True), back) < 2e-6
    assert gap(adapter.turn(there, back=True), x) < 2e-6 and gap(there, x) > 0.05


def test_each_factor_mixes_twice_as_widely():
    for factors, reach in ((1, 2), (2, 4), (3, 8), (4, 16)):
        model = wrapped(boft_block_size=2, boft_n_butterfly_factor=factors)
        with torch.no_grad():
            model.base_model.layers["lin0"].boft_R["default"].copy_(models.noise((factors, 8, 2, 2), 3))
            M = model.base_model.layers["lin0"].adapters["default"].turn(torch.eye(16))
        assert (M.abs() > 1e-7).sum(1).tolist() == [reach] * 16


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"boft_block_num": 2}, "boft_block_size and boft_block_num"),
        ({"boft_block_size": 0}, "boft_block_size and boft_block_num"),
        ({"boft_n_butterfly_factor": 0}, "boft_n_butterfly_factor"),
        ({"boft_dropout": -0.1}, "boft_dropout"),
        ({"bias": "some"}, "bias"),
        ({"boft_block_size": 5}, "do not fit the 16 inputs of lin0"),
        ({"boft_block_size": 0, "boft_block_num": 3}, "do not fit the 16 inputs of lin0"),
        ({"boft_n_butterfly_factor": 4}, "do not fit the 16 inputs of lin0"),
    ],
)
def test_what_does_not_fit_is_named(config, names):
    with pytest.raises(ValueError, match=names):
        wrapped(**config)


def test_grouped_convolutions_are_refused_by_name():
    with pytest.raises(ValueError, match="cannot adapt 0: it is a convolution with groups"):
        wrapped(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), target_modules=["0"])
