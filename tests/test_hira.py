"""HiRA beyond the laws: ranks by layer, files that upstream wrote without them, refused settings."""

from __future__ import annotations

import models
import pytest
import torch
from torch import nn

import peft

T = ["lin0", "lin1"]


def ranks(model):
    return {path: layer.adapters["default"].factors()[0].shape[0] for path, layer in model.base_model.layers.items()}


def test_rank_pattern_is_read(tmp_path):
    config = peft.HiraConfig(r=4, target_modules=T, rank_pattern={"lin0": 2})
    model = peft.get_peft_model(models.build("mlp"), config)
    assert ranks(model) == {"lin0": 2, "lin1": 4}
    model.save_pretrained(tmp_path)
    assert ranks(peft.PeftModel.from_pretrained(models.build("mlp"), tmp_path)) == {"lin0": 2, "lin1": 4}


@pytest.mark.parametrize("trainable", [True, False])
def test_files_with_one_rank_although_their_config_has_others_load(tmp_path, trainable):
    """Upstream never reads rank_pattern, so it writes such files."""
    x = models.noise((4, models.WIDTH), 7)
    model = peft.get_peft_model(models.build("mlp"), peft.HiraConfig(r=4, target_modules=T, init_weights=False))
    wanted = model(x)
    model.peft_config["default"].rank_pattern = {"lin0": 2}
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(models.build("mlp"), tmp_path, is_trainable=trainable)
    assert ranks(loaded) == {"lin0": 4, "lin1": 4}
    assert torch.equal(loaded(x), wanted)
    assert all(p.requires_grad is trainable for n, p in loaded.named_parameters() if "hira" in n)
    again = peft.get_peft_model(models.build("mlp"), peft.HiraConfig(r=4, target_modules=T, rank_pattern={"lin0": 2}))
    peft.set_peft_model_state_dict(again, peft.get_peft_model_state_dict(model))
    assert torch.equal(again(x), wanted)


def test_other_wrong_ranks_are_still_an_error():
    model = peft.get_peft_model(models.build("mlp"), peft.HiraConfig(r=4, target_modules=T))
    other = peft.get_peft_model(models.build("mlp"), peft.HiraConfig(r=3, target_modules=T))
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(other))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("hira_dropout", 1.5),
        ("init_weights", "foo"),
        ("rank_pattern", {"a": 0}),
        ("rank_pattern", {"a": 0.5}),
    ],
)
def test_wrong_settings_are_named(field, value):
    with pytest.raises(ValueError, match=rf"HiraConfig\.{field}"):
        peft.HiraConfig(**{field: value})


def test_convolutions_with_groups_are_refused():
    with pytest.raises(ValueError, match="grouped is a convolution with groups"):
        peft.get_peft_model(models.build("convs"), peft.HiraConfig(target_modules=["head", "grouped"]))


def test_gaussian_starts_with_normal_factors():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(400, 300))
    model = peft.get_peft_model(base, peft.HiraConfig(r=8, target_modules=["0"], init_weights="gaussian"))
    A = model.base_model.model[0].hira_A["default"].detach()
    assert A.std().item() == pytest.approx(1 / 8, rel=0.05) and A.abs().max() > 3 / 8
