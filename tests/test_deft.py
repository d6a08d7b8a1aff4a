"""DEFT beyond the laws: refused settings, ranks beyond the layer, what is trained."""

from __future__ import annotations

import models
import pytest
import torch

import peft


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("decomposition_method", "svd"),
        ("init_scale", float("inf")),
        ("deft_dropout", 2),
        ("bias", "lora_only"),
    ],
)
def test_wrong_settings_are_named(field, value):
    with pytest.raises(ValueError, match=rf"DeftConfig\.{field} must be"):
        peft.DeftConfig(**{field: value})


def test_rank_is_at_most_the_outputs():
    model = peft.get_peft_model(models.build("mlp"), peft.DeftConfig(r=20, alpha=10, target_modules=["lin0", "lin1"]))
    layers = model.base_model.layers
    assert {k: v.deft_P["default"].shape[1] for k, v in layers.items()} == {"lin0": 20, "lin1": 5}
    assert {k: v.scaling_R["default"] for k, v in layers.items()} == {"lin0": 0.5, "lin1": 2.0}


@pytest.mark.parametrize("method", ["relu", "qr"])
@torch.no_grad()
def test_replaces_only_what_p_spans(method):
    """What is orthogonal to P in the output stays as it was."""
    config = peft.DeftConfig(r=3, decomposition_method=method, init_weights=False, target_modules=["lin0"])
    model = peft.get_peft_model(models.build("mlp"), config).eval()
    layer, x = model.base_model.layers["lin0"], models.noise((40, models.WIDTH), 7)
    P = layer.deft_P["default"].mul_(20)
    change = layer(x) - layer.base_layer(x)
    Q = torch.linalg.qr(P)[0]
    assert change.abs().max() > 0.1 and torch.allclose(change @ Q @ Q.T, change, atol=1e-5)
    if method == "qr":  # W's part in that span is gone: what is left there is R's
        kept = (layer(x) - layer.base_layer.bias) @ Q
        wanted = x @ layer.deft_R["default"].T
        assert torch.allclose(kept @ Q.T @ Q, kept, atol=1e-5) and torch.allclose(kept, wanted, atol=1e-4)


def test_biases_are_trained_and_saved_where_asked():
    config = peft.DeftConfig(r=3, target_modules=["lin0"], bias="deft_only")
    model = peft.get_peft_model(models.build("mlp"), config)
    model(models.noise((4, models.WIDTH), 7)).sum().backward()
    layer = model.base_model.layers["lin0"]
    assert layer.base_layer.bias.grad.abs().sum() > 0
    assert "base_model.model.lin0.base_layer.bias" in peft.get_peft_model_state_dict(model)
