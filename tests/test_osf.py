"""OSF: what is frozen stays out of the gradients' reach, for copies of a model too."""

from __future__ import annotations

import copy

import models
import pytest
import torch

import peft


def trained(**changes):
    config = peft.OSFConfig(**{"target_modules": ["lin0", "lin1"], "effective_rank": 3, **changes})
    return peft.get_peft_model(models.fill(models.Mlp()), config)


@pytest.mark.parametrize("copied", [False, True])
def test_training_moves_nothing_into_the_frozen_directions(copied):
    model = copy.deepcopy(trained()) if copied else trained()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(models.noise((6, models.WIDTH), 7)).square().sum().backward()
        optimizer.step()
    for path, layer in model.base_model.layers.items():
        W = layer.get_base_layer().weight
        U, _, V = torch.linalg.svd(W, full_matrices=False)
        p = layer.osf_svd_params["default"]
        assert (U[:, :3].T @ p["U_low"]).abs().max() < 1e-4 and (p["V_low"] @ V[:3].T).abs().max() < 1e-4, path
        start = torch.linalg.svd(W, full_matrices=False)[1][3:]
        assert (p["S_low"] - start).abs().max() > 1e-4


def test_models_without_a_default_have_all_linear_layers_adapted():
    model = peft.get_peft_model(models.fill(models.Mlp()), peft.OSFConfig())
    assert set(model.base_model.layers) == {"lin0", "lin1"}


@pytest.mark.parametrize("rank", [0, -1, 0.01])
def test_ranks_that_freeze_nothing_are_refused(rank):
    with pytest.raises(ValueError, match="effective_rank"):
        trained(effective_rank=rank)
