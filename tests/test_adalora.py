"""AdaLoRA's budget: the same triplets as upstream's after the same training; cut files; the orthogonality loss."""

from __future__ import annotations

import json

import models
import pytest
import torch
import trained
from torch import nn

import peft
from peft.methods.adalora_budget import RankAllocator


def plan(**changes):
    """A config for the two layers of `models.Mlp`."""
    settings = {"init_r": 4, "target_r": 2, "total_step": 10, "target_modules": ["lin0", "lin1"], "lora_alpha": 12}
    return peft.AdaLoraConfig(**{**settings, **changes})


def llama(**changes):
    """A llama that a loss can be asked of."""
    settings = {"init_r": 4, "target_r": 2, "total_step": 6, "target_modules": ["q_proj", "v_proj"]}
    model = peft.get_peft_model(models.llama(), peft.AdaLoraConfig(**{**settings, **changes}))
    trained.start(model)
    return model.train()


def steps(model, indices, lr=0.02):
    """Training steps."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for i in indices:
        trained.llama_step(model, i)
        optimizer.step()
        model.base_model.update_and_allocate(i)
        optimizer.zero_grad()


def outputs(model):
    """The logits on the fixed input."""
    return models.run(model.eval(), "llama")


def ranks(model, name="default"):
    """{layer: how many triplets it holds}."""
    return {path: len(layer.lora_E[name]) for path, layer in model.base_model.layers.items()}


def test_thirty_steps_give_upstreams_triplets_and_losses():
    wanted = json.loads((trained.TARGET / "adalora.json").read_text())
    found = trained.adalora(peft)
    assert found["ranks"] == wanted["ranks"] and found["pattern"] == wanted["pattern"]
    assert found["losses"] == pytest.approx(wanted["losses"], abs=1e-5)
    for key, values in wanted["values"].items():
        assert found["values"][key] == pytest.approx(values, abs=1e-5)
    assert sum(sum(flags) for flags in found["pattern"].values()) == 12
    for other in ({"beta1": 0.2}, {"beta2": 0.01}):
        assert trained.adalora(peft, **other)["ranks"] != wanted["ranks"], "else this compares nothing"


def test_the_budget_falls_along_a_cubic_curve():
    model = peft.get_peft_model(models.fill(models.Mlp()), plan(tinit=2, tfinal=2, total_step=12))
    adapters = [layer.adapters["default"] for layer in model.base_model.layers.values()]
    allocator = RankAllocator(model.peft_config["default"])
    found = [allocator.budget(adapters, i) for i in range(13)]
    assert found == [8, 8, 8, *(int(4 + 4 * (1 - k / 8) ** 3) for k in range(1, 9)), 4, 4]


def test_a_trained_adapter_is_saved_without_what_the_budget_left_out(tmp_path):
    model = llama()
    steps(model, range(7))
    kept = {k.removesuffix(".lora_E"): sum(v) for k, v in model.peft_config["default"].rank_pattern.items()}
    assert sum(kept.values()) == 8 and set(ranks(model).values()) == {4}
    before = outputs(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(models.llama(), tmp_path)
    assert ranks(loaded) == kept
    torch.testing.assert_close(outputs(loaded), before, atol=1e-6, rtol=1e-5)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(models.run(merged, "llama"), before, atol=1e-5, rtol=1e-5)


def test_what_was_left_out_stays_out_while_training_goes_on():
    model = llama(tfinal=2)
    steps(model, range(12), lr=0.5)
    pattern = model.peft_config["default"].rank_pattern
    for path, layer in model.base_model.layers.items():
        zero = (layer.lora_E["default"] == 0).flatten().tolist()
        assert zero == [not k for k in pattern[f"{path}.lora_E"]]


def test_training_goes_on_from_a_cut_file(tmp_path):
    """The budget is then one of the triplets that are left. (Upstream cannot read what it writes then.)"""
    model = llama()
    steps(model, range(7))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(models.llama(), tmp_path, is_trainable=True).train()
    assert again.base_model.trainable_adapter_name == "default"
    assert all(p.requires_grad for layer in again.base_model.layers.values() for p in layer.lora_E.values())
    first = ranks(again)
    again.peft_config["default"].target_r = 1
    steps(again, range(7))
    assert ranks(again) == first and sum(map(sum, again.peft_config["default"].rank_pattern.values())) == 4
    before = outputs(again)
    again.save_pretrained(tmp_path / "second")
    last = peft.PeftModel.from_pretrained(models.llama(), tmp_path / "second")
    assert sum(ranks(last).values()) == 4 and all(ranks(last)[k] <= first[k] for k in first)
    torch.testing.assert_close(outputs(last), before, atol=1e-6, rtol=1e-5)


def test_resizing_keeps_the_triplets_that_the_pattern_names():
    model = peft.get_peft_model(models.fill(models.Mlp()), plan(init_lora_weights=False))
    layer, x = model.base_model.layers["lin0"], models.inputs("mlp")["x"]
    A = layer.lora_A["default"].detach().clone()
    with torch.no_grad():
        layer.lora_E["default"][[1, 2]] = 0
    before = model(x)
    pattern = {"lin0.lora_E.default": [True, False, False, True], "lin1.lora_E": torch.ones(4, dtype=torch.bool)}
    model.base_model.resize_modules_by_rank_pattern(pattern, "default")
    assert torch.equal(layer.lora_A["default"], A[[0, 3]]) and layer.lora_A["default"].requires_grad
    torch.testing.assert_close(model(x), before)
    with pytest.raises(ValueError, match="lists 3 triplets for lin0"):
        model.base_model.resize_modules_by_rank_pattern({"lin0.lora_E": [True] * 3}, "default")


def test_a_layer_may_lose_all_its_triplets(tmp_path):
    pattern = {"lin0.lora_E": [False] * 4, "lin1.lora_E": [True] * 4}
    model = peft.get_peft_model(models.fill(models.Mlp()), plan(rank_pattern=pattern, init_lora_weights=False))
    model.save_pretrained(tmp_path)
    loaded, x = peft.PeftModel.from_pretrained(models.fill(models.Mlp()), tmp_path), models.inputs("mlp")["x"]
    assert ranks(loaded) == {"lin0": 0, "lin1": 4}
    with torch.no_grad():
        model.base_model.layers["lin0"].lora_E["default"].zero_()
        torch.testing.assert_close(loaded(x), model(x))
        loaded.merge_adapter()
        torch.testing.assert_close(loaded(x), model(x))


def test_only_one_adapter_may_be_trained():
    model = peft.get_peft_model(models.fill(models.Mlp()), plan())
    with pytest.raises(ValueError, match="only 1 trainable adapter"):
        model.add_adapter("other", plan())
    assert list(model.peft_config) == ["default"]
    model.add_adapter("other", plan(inference_mode=True))
    assert model.base_model.trainable_adapter_name == "default"


def test_the_loss_says_how_far_from_orthogonal_the_factors_are():
    model, ids = llama(orth_reg_weight=0.3), models.inputs("llama")["input_ids"]
    total = model(input_ids=ids, labels=ids)
    model.peft_config["default"].orth_reg_weight = 0.0
    plain = model(input_ids=ids, labels=ids).loss
    gaps = []
    for layer in model.base_model.layers.values():
        for rows in (layer.lora_A["default"], layer.lora_B["default"].T):
            gaps.append(torch.linalg.matrix_norm(rows @ rows.T - torch.eye(4)))
    torch.testing.assert_close(total.loss, plain + 0.3 * sum(gaps) / len(gaps))
    assert total["loss"] is total.loss
    model.peft_config["default"].orth_reg_weight = 0.3
    with model.disable_adapter():
        assert torch.equal(
            model(input_ids=ids, labels=ids).loss, models.llama().train()(input_ids=ids, labels=ids).loss
        )


def test_gradients_are_needed_to_choose():
    model = llama()
    with pytest.raises(ValueError, match="after backward and before zero_grad"):
        model.base_model.update_and_allocate(1)


def test_mixes_with_lora_on_one_layer():
    lora = peft.LoraConfig(r=2, target_modules=["lin0"], init_lora_weights=False)
    model = peft.get_peft_model(models.fill(models.Mlp()), plan(init_lora_weights=False), mixed=True)
    model.add_adapter("lora", lora)
    assert "lora" not in model.base_model.layers["lin0.base_layer"].lora_A
    x = models.inputs("mlp")["x"]
    first = model(x)
    model.set_adapter(["default", "lora"])
    assert (model(x) - first).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"total_step": None}, "total_step"),
        ({"total_step": 0}, "total_step"),
        ({"tinit": 6, "tfinal": 4}, "tinit \\+ tfinal = 10"),
        ({"use_dora": True}, "use_dora"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora"),
        ({"deltaT": 0}, "deltaT"),
        ({"orth_reg_weight": -1.0}, "orth_reg_weight"),
        ({"beta1": 1.5}, "beta1"),
        ({"rank_pattern": {"lin0.lora_E": 3}}, "rank_pattern"),
    ],
)
def test_wrong_settings_name_the_field(settings, said):
    with pytest.raises(ValueError, match=said):
        plan(**settings)


def test_settings_of_lora_without_effect_are_told():
    with pytest.warns(UserWarning, match="does not use r, use_rslora"):
        plan(r=4, use_rslora=True)


def test_combining_is_refused():
    model = peft.get_peft_model(models.fill(models.Mlp()), plan())
    with pytest.raises(TypeError, match="add_weighted_adapter"):
        model.base_model.add_weighted_adapter(["default"], [1.0], "new")
    assert isinstance(model.base_model, peft.LoraModel) and isinstance(model.base_model, nn.Module)
