"""KappaTune's choice of layers, and the removal of intruder dimensions."""

from __future__ import annotations

import models
import pytest
import torch
from torch import nn

import peft
from peft.helpers import KappaTuneSelector, find_kappa_target_modules
from peft.methods.lora.intruders import reduce_intruder_dimension


def with_condition(number, out=8, inp=6, seed=1):
    layer = nn.Linear(inp, out)
    U, _, V = torch.linalg.svd(models.noise((out, inp), seed), full_matrices=False)
    with torch.no_grad():
        layer.weight.copy_(U @ torch.diag(torch.linspace(number, 1, inp)) @ V)
    return layer


def test_kappa_orders_layers_by_condition():
    base = nn.Sequential(*[with_condition(n, seed=i + 1) for i, n in enumerate((9.0, 2.0, 30.0, 4.0))])
    selector = KappaTuneSelector(base, show_progress=False)
    assert selector.get_best_targets() == ["1", "3", "0", "2"]
    assert selector.get_best_targets(num_modules=2) == ["1", "3"]
    assert selector.get_best_targets(top_p=0.3) == ["1"]
    assert selector.get_best_targets(threshold=9.5) == ["1", "3", "0"]
    assert selector.get_best_target_parameters(top_p=0.5) == []
    assert find_kappa_target_modules(base, top_p=0.5, show_progress=False) == {
        "target_modules": ["1", "3"],
        "target_parameters": None,
    }
    assert KappaTuneSelector(base, max_dim_size_to_analyze=7, show_progress=False).get_best_targets() == []


def test_kappa_knows_expert_parameters():
    model = models.build("moe")
    found = find_kappa_target_modules(model, top_p=0.5, show_progress=False)
    assert found["target_parameters"] and all(
        dict(model.named_parameters())[n].ndim == 3 for n in found["target_parameters"]
    )
    config = peft.LoraConfig(target_modules=found["target_modules"], target_parameters=found["target_parameters"])
    assert peft.get_peft_model(model, config).get_nb_trainable_parameters()[0] > 0


def intruded(kind=nn.Linear):
    """A base of strong known directions, and an adapter that adds one no base direction is near to."""
    base = nn.Sequential(nn.Linear(16, 20, bias=False))
    U = torch.linalg.qr(models.noise((20, 20), 3))[0]
    V = torch.linalg.qr(models.noise((16, 16), 4))[0]
    with torch.no_grad():
        base[0].weight.copy_(U[:, :16] @ torch.diag(torch.linspace(9, 1, 16)) @ V)
        model = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0"])).eval()
        A, B = model.base_model.layers["0"].adapters["default"].factors()
        A.copy_(torch.stack([V[10] * 5, V[0] * 0.2]))
        B.copy_(torch.stack([U[:, 18], U[:, 0] * 0.2], 1))
    return model, U[:, 18], V[10]


def test_intruders_become_weaker_and_nothing_else_changes():
    model, u, v = intruded()
    lines = []
    layer = model.base_model.layers["0"]
    before = layer.get_delta_weight("default")
    reduce_intruder_dimension(model, mitigation_lambda=0.25, logging_sink=lines.append)
    assert lines == ["0: 1 intruders"] and model.active_adapters == ["intruder_reduced"]
    after = layer.get_delta_weight("intruder_reduced")
    assert torch.equal(layer.get_delta_weight("default"), before)
    # The base has a share in v, so the merged direction is not exactly (u, v).
    torch.testing.assert_close(u @ after @ v, 0.25 * (u @ before @ v), rtol=0.05, atol=0)
    changed = after - before
    assert torch.linalg.matrix_rank(changed, atol=0.5) == 1 and (u @ changed).norm() > 0.9 * changed.norm()


def test_without_intruders_the_adapter_is_copied():
    model, _, _ = intruded()
    with torch.no_grad():
        model.base_model.layers["0"].adapters["default"].factors()[0][0].zero_()
    reduce_intruder_dimension(model, top_k=6, logging_sink=None)
    layer = model.base_model.layers["0"]
    assert torch.equal(layer.get_delta_weight("intruder_reduced"), layer.get_delta_weight("default"))


def test_intruders_of_other_methods_are_refused():
    model = peft.get_peft_model(models.Mlp(), peft.VeraConfig(target_modules=["lin0"]))
    with pytest.raises(ValueError, match="LoRA adapters only"):
        reduce_intruder_dimension(model)
