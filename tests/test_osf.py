"""OSF: what is frozen stays out of the gradients' reach, for copies of a model too."""

from __future__ import annotations

import copy
import json

import models
import pytest
import torch
import trained as runs

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


@pytest.mark.parametrize("name", ["osf", "osf_more"])
def test_six_steps_end_where_upstreams_do(name):
    wanted, found = json.loads((runs.TARGET / f"{name}.json").read_text()), runs.RUNS[name](peft)
    assert found["losses"] == pytest.approx(wanted["losses"], abs=1e-5)
    assert max(wanted["losses"]) - min(wanted["losses"]) > 0.1
    for key, values in wanted["deltas"].items():
        assert found["deltas"][key] == pytest.approx(values, abs=1e-5)


def test_a_loaded_adapter_goes_on_avoiding_the_frozen_directions(tmp_path):
    trained().save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(models.fill(models.Mlp()), tmp_path, is_trainable=True)
    model(models.noise((6, models.WIDTH), 7)).square().sum().backward()
    for layer in model.base_model.layers.values():
        U, _, V = torch.linalg.svd(layer.get_base_layer().weight, full_matrices=False)
        p = layer.osf_svd_params["default"]
        assert p["U_low"].grad.abs().max() > 1e-4
        assert (U[:, :3].T @ p["U_low"].grad).abs().max() < 1e-5 and (p["V_low"].grad @ V[:3].T).abs().max() < 1e-5


@pytest.mark.parametrize(("rank", "sides"), [(3, {"lin0": (3, 3), "lin1": (2, 3)}), (14, {"lin0": (14, 2)})])
def test_of_a_whole_basis_the_smaller_part_is_kept(rank, sides):
    """lin0 is 24 x 16, lin1 5 x 24: V of the one and U of the other are square."""
    model = trained(effective_rank=rank, target_modules=list(sides))
    for path, layer in model.base_model.layers.items():
        adapter = layer.adapters["default"]
        assert (adapter.osf_U_side.shape[1], adapter.osf_V_side.shape[1]) == sides[path]


def test_one_decomposition_makes_an_adapter(monkeypatch):
    calls, svd = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: calls.append(a) or svd(*a, **k))
    model = trained()
    assert len(calls) == 2 and all(layer.adapters["default"].low is None for layer in model.base_model.layers.values())


@torch.no_grad()
def test_everything_may_be_frozen(tmp_path):
    model, x = trained(effective_rank=1.0), models.noise((6, models.WIDTH), 7)
    assert not any(p.numel() for p in model.parameters() if p.requires_grad)
    assert torch.equal(model(x), models.fill(models.Mlp())(x))
    model.save_pretrained(tmp_path)
    assert torch.equal(peft.PeftModel.from_pretrained(models.fill(models.Mlp()), tmp_path)(x), model(x))


def test_the_setting_without_effect_is_told():
    with pytest.warns(UserWarning, match="target_svd_config has no effect"):
        peft.OSFConfig(target_svd_config={"lin0.weight": 8})
