"""PEANuT beyond the laws: refused settings, and what follows the base weight."""

from __future__ import annotations

import models
import pytest
import torch

import peft


@pytest.mark.parametrize(
    ("field", "value"), [("r", 0), ("depth", -1), ("act_fn", "foo"), ("act_fn", "Relu"), ("scaling", float("nan"))]
)
def test_wrong_settings_are_named(field, value):
    with pytest.raises(ValueError, match=rf"PeanutConfig\.{field} must be"):
        peft.PeanutConfig(**{field: value})


@pytest.mark.parametrize("act_fn", ["relu", "prelu", "xielu", "laplace", "gelu_10"])
def test_activations_hold_nothing_that_is_trained_or_saved(act_fn):
    config = peft.PeanutConfig(r=3, depth=1, act_fn=act_fn, target_modules=["lin0"], init_weights=False)
    model = peft.get_peft_model(models.build("mlp"), config)
    names = {n.rpartition("peanut_")[2] for n, p in model.named_parameters() if "peanut" in n}
    assert names == {"A.default.weight", "B.default.weight", "encoders.default.0.weight", "decoders.default.0.weight"}
    assert model(models.noise((4, models.WIDTH), 7)).isfinite().all()


@torch.no_grad()
def test_mixed_batches_follow_the_base_weight():
    """The factors that a mixed batch keeps are made from it."""
    config = {"r": 3, "target_modules": ["lin0"], "init_weights": False}
    model = peft.get_peft_model(models.build("mlp"), peft.PeanutConfig(**config)).eval()
    model.add_adapter("second", peft.PeanutConfig(**config))
    x, names = models.noise((3, models.WIDTH), 7), ["default", "second", "__base__"]
    before = model(x, adapter_names=names)
    model.base_model.layers["lin0"].base_layer.weight.mul_(2)
    after = model(x, adapter_names=names)
    assert not torch.allclose(before, after, atol=1e-2)
    for i, name in enumerate(names[:2]):
        torch.testing.assert_close(after[i], model(x, adapter_names=name)[i])


def test_scaling_can_be_set():
    model = peft.get_peft_model(models.build("mlp"), peft.PeanutConfig(r=3, scaling=2.0, target_modules=["lin0"]))
    layer = model.base_model.layers["lin0"]
    layer.set_scale("default", 3)
    assert layer.scaling == {"default": 6.0}
    layer.unscale_layer()
    assert layer.scaling == {"default": 2.0}
