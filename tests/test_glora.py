"""GLoRA beyond the laws: refused settings, what layers without a bias leave out, how much is trained."""

from __future__ import annotations

import models
import pytest
import torch
from torch import nn

import peft


@pytest.mark.parametrize(
    ("field", "value"),
    [("r", 0), ("config_A_B", "matrix"), ("config_C", "constant"), ("config_D_E", "lora"), ("bias", "lora_only")],
)
def test_wrong_settings_are_named(field, value):
    with pytest.raises(ValueError, match=rf"GloraConfig\.{field} must be"):
        peft.GloraConfig(**{field: value})


def test_layers_without_a_bias_get_none():
    base = nn.Sequential(nn.Linear(6, 4, bias=False))
    model = peft.get_peft_model(base, peft.GloraConfig(r=2, target_modules=["0"], init_weights=False)).eval()
    names = {n.partition("glora_")[2][0] for n, p in model.named_parameters() if p.requires_grad}
    assert names == {"A", "B"}
    x = models.noise((3, 6), 1)
    before = model(x)
    merged = model.merge_and_unload()
    assert merged[0].bias is None and torch.allclose(merged(x), before, atol=1e-6)


@pytest.mark.parametrize("how", ["lora", "vector", "constant", "none"])
def test_trained_base_biases_get_their_gradient(how):
    """y holds b(1 + D): its gradient is the sum of the output's, times 1 + D."""
    config = peft.GloraConfig(
        r=2, target_modules=["0"], bias="glora_only", config_A_B=how, config_D_E="vector", init_weights=False
    )
    model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 4)), config)
    layer, g = model.base_model.layers["0"], models.noise((3, 4), 2)
    model(models.noise((3, 6), 1)).backward(g)
    wanted = g.sum(0) * (1 + layer.glora_D["default"].X)
    torch.testing.assert_close(layer.base_layer.bias.grad, wanted)
