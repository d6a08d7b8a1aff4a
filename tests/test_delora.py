"""DeLoRA beyond the laws: refused settings, what λ bounds, lengths that stay those of the start."""

from __future__ import annotations

import models
import pytest
import torch

import peft


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("delora_lambda", float("inf")),
        ("module_dropout", 1.5),
        ("bias", "lora_only"),
        ("rank_pattern", {"a": 0}),
        ("lambda_pattern", {"a": float("nan")}),
    ],
)
def test_wrong_settings_are_named(field, value):
    with pytest.raises(ValueError, match=rf"DeloraConfig\.{field}"):
        peft.DeloraConfig(**{field: value})


@torch.no_grad()
def test_lambda_bounds_the_update_whatever_a_and_b():
    config = peft.DeloraConfig(r=4, delora_lambda=3, target_modules=["lin0"], init_weights=False)
    layer = peft.get_peft_model(models.build("mlp"), config).base_model.layers["lin0"]
    lengths = layer.base_layer.weight.norm(dim=0)
    for scale in (1, 100):
        layer.delora_A["default"].mul_(scale)
        relative = layer.get_delta_weight("default") / lengths
        assert 0 < relative.norm() <= 3 + 1e-5
        if scale == 1:
            first = relative
    torch.testing.assert_close(relative, first)


@torch.no_grad()
def test_lengths_stay_those_of_the_base_at_the_start(tmp_path):
    config = peft.DeloraConfig(r=2, target_modules=["lin0"], init_weights=False)
    model = peft.get_peft_model(models.build("mlp"), config)
    layer = model.base_model.layers["lin0"]
    wanted, before = layer.base_layer.weight.norm(dim=0), layer.get_delta_weight("default")
    layer.base_layer.weight.mul_(2)
    assert torch.equal(layer.get_delta_weight("default"), before)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(models.build("mlp"), tmp_path, check_base=False).base_model.layers["lin0"]
    torch.testing.assert_close(loaded.delora_w_norm["default"], wanted)
