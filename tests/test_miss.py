"""MiSS: what the laws do not cover."""

from __future__ import annotations

import models
import pytest
import torch
from laws_table import gap

import peft


def wrapped(**config):
    return peft.get_peft_model(models.build("mlp"), peft.MissConfig(**{"target_modules": ["lin0"], "r": 4, **config}))


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"r": 0}, "MissConfig.r"),
        ({"r": 17}, "r=17 is more than lin0 has inputs: 16"),
        ({"mini_r": 0}, "MissConfig.mini_r"),
        ({"init_weights": "mini", "mini_r": 5}, "mini_r=5 does not divide the 24 outputs of lin0"),
        ({"init_weights": "bat", "r": 3}, "cuts lin0, 24 x 16, into tiles of r=3"),
        ({"init_weights": "best"}, "MissConfig.init_weights"),
        ({"bias": "some"}, "MissConfig.bias"),
    ],
)
def test_what_does_not_fit_is_named(config, names):
    with pytest.raises(ValueError, match=names):
        wrapped(**config)


@pytest.mark.parametrize("bias", ["miss_only", "MiSS_only"])
def test_both_spellings_train_the_biases_of_adapted_layers(bias):
    names = [n for n, p in wrapped(bias=bias).named_parameters() if p.requires_grad]
    assert names == ["base_model.model.lin0.base_layer.bias", "base_model.model.lin0.miss_block.default"]


@torch.no_grad()
def test_several_bat_adapters_act_on_one_another():
    """W ↦ W(I + B) + B, once for each, in order."""
    model = wrapped(init_weights="bat", r=8)
    model.add_adapter("second", peft.MissConfig(target_modules=["lin0"], r=8, init_weights="bat"))
    layer, x = model.base_model.layers["lin0"], models.noise((5, 16), 1)
    W = layer.base_layer.weight.double().view(3, 8, 2, 8)
    for name in ("default", "second"):
        B = layer.miss_block[name].copy_(models.noise((3, 8, 8), len(name))).double()
        W = torch.einsum("oriq,oqp->orip", W, B) + W + B[:, :, None]
    model.base_model.set_adapter(["default", "second"])
    wanted = x.double() @ W.reshape(24, 16).T + layer.base_layer.bias
    assert gap(layer(x), wanted) < 1e-6
    model.merge_adapter(["default"])
    assert gap(layer(x), wanted) < 1e-6
