"""RoAd: what the laws do not cover."""

from __future__ import annotations

import models
import pytest
import torch

import peft


def wrapped(**config):
    return peft.get_peft_model(models.build("mlp"), peft.RoadConfig(**{"target_modules": ["lin0"], **config}))


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_angles_turn_pairs_half_a_group_apart(variant):
    """All angles 90°: y' = (-y₂, y₁) within each group, and lengths stay."""
    layer = wrapped(group_size=8, variant=variant).base_model.layers["lin0"]
    with torch.no_grad():
        layer.road_theta["default"].fill_(torch.pi / 2)
        y = models.noise((3, 24), 4)
        found = layer.adapters["default"].rotate(y)
    first, second = y.view(3, 3, 2, 4).unbind(2)
    assert torch.allclose(found, torch.stack([-second, first], 2).view(3, 24), atol=1e-6)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"group_size": 3}, "group_size must be even"),
        ({"group_size": 0}, "group_size"),
        ({"variant": "road_3"}, "variant"),
        ({"group_size": 16}, "does not divide the 24 outputs of lin0"),
    ],
)
def test_what_does_not_fit_is_named(config, names):
    with pytest.raises(ValueError, match=names):
        wrapped(**config)
