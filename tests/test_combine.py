"""Weighted combinations of adapters: what is exact is exact, what is not says so, what cannot be is refused."""

from __future__ import annotations

import json

import models
import pytest
import torch
from helpers import snapshot

from peft import LoraConfig, PeftModel, get_peft_model
from peft.errors import AdapterError, PeftWarning
from peft.methods.lora import merge_utils

QV = ["q_proj", "v_proj"]


def build(base: str, *configs: dict, targets=QV) -> PeftModel:
    """A base with one random adapter per config, named a0, a1, ..."""
    model = None
    for i, changes in enumerate(configs):
        config = LoraConfig(**{"target_modules": targets, "r": 4, "lora_alpha": 8, **changes})
        if model is None:
            model = get_peft_model(models.build(base), config, adapter_name="a0")
        else:
            model.add_adapter(f"a{i}", config)
    for i in range(len(configs)):
        model.set_requires_grad(f"a{i}")
    models.perturb(model, scale=0.4)
    return model.eval()


def error(model, weights, name="new") -> float:
    """The largest relative difference of the new adapter's updates from the weighted sum of the old ones'."""
    worst = 0.0
    for layer in model.base_model.layers.values():
        terms = [w * layer.get_delta_weight(a) for a, w in weights.items() if a in layer.adapters]
        worst = max(worst, float((layer.get_delta_weight(name) - sum(terms)).norm() / sum(terms).norm()))
    return worst


SOURCES = {
    "plain": ("llama", [{}, {"r": 2, "lora_alpha": 3}], [*QV, "embed_tokens"]),
    "rslora": ("llama", [{"use_rslora": True, "r": 3}, {}], QV),
    "patterns": ("llama", [{"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"v_proj": 1}}, {"r": 2}], QV),
    "subtracted starts": ("llama", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}], QV),
    "mica": ("llama", [{"init_lora_weights": "mica"}, {}], ["q_proj"]),
    "convolutions": ("convs", [{}, {"r": 2}], ["conv1", "conv2", "conv3", "head"]),
    "Conv1D": ("gpt2", [{"fan_in_fan_out": True}, {"fan_in_fan_out": True}], ["c_attn"]),
    "attention": ("attention", [{}, {}], ["mha"]),
    "apart": ("llama", [{"target_modules": ["q_proj"]}, {"target_modules": ["v_proj"]}], None),
    "regexes": ("llama", [{"target_modules": ".*q_proj"}, {"target_modules": ".*v_proj"}], None),
    "layers": ("llama", [{"layers_to_transform": [0]}, {"layers_to_transform": [1]}], QV),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("how", [{"combination_type": "cat"}, {"combination_type": "svd", "svd_rank": 16}])
def test_cat_and_svd_are_exact(source, how):
    base, configs, targets = SOURCES[source]
    model = build(base, *configs, targets=targets)
    model.add_weighted_adapter(["a0", "a1"], [0.7, -0.4], "new", **how)
    assert error(model, {"a0": 0.7, "a1": -0.4}) < 2e-6
    assert {a.scaling for layer in model.base_model.layers.values() for a in [layer.adapters["new"]]} == {1.0}


def test_config_of_the_result():
    model = build("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "target_modules": ["q_proj"]}, {"r": 3})
    model.add_weighted_adapter(["a0", "a1"], [1, 1], "new", "cat")
    config = model.peft_config["new"]
    assert (config.r, config.lora_alpha, config.rank_pattern, config.use_rslora) == (7, 7, {}, False)
    assert config.target_modules == {"q_proj", "v_proj"}
    assert model.active_adapters == ["a0"]
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".new." in n)


def test_freezing_is_not_by_substring():
    """Upstream froze every adapter whose parameters' names contain the new name."""
    model = build("llama", {}, {})
    before = snapshot(model, trainable=True).keys()
    model.add_weighted_adapter(["a0", "a1"], [1, 1], "w", "cat")
    assert snapshot(model, trainable=True).keys() == before


def test_linear_keeps_its_definition_and_measures_itself():
    model = build("llama", {}, {"lora_alpha": 2})
    with pytest.warns(PeftWarning, match=r"'linear' is off by \d+% .* 'cat' is exact"):
        model.add_weighted_adapter(["a0", "a1"], [0.7, -0.4], "new", "linear")
    layer = model.base_model.layers["model.layers.0.self_attn.q_proj"]
    A0, A1, A = (layer.lora_A[n].weight for n in ("a0", "a1", "new"))
    B0, B1, B = (layer.lora_B[n].weight for n in ("a0", "a1", "new"))
    torch.testing.assert_close(A, 1.4**0.5 * A0 - 0.2**0.5 * A1)
    torch.testing.assert_close(B, 1.4**0.5 * B0 + 0.2**0.5 * B1)


def test_a_truncated_svd_measures_itself():
    model = build("llama", {}, {})
    with pytest.warns(PeftWarning, match="'svd' is off by"):
        model.add_weighted_adapter(["a0", "a1"], [1, 1], "new")
    assert error(model, {"a0": 1, "a1": 1}) > 0.01


@pytest.mark.parametrize("weight", [0.6, -0.6])
@pytest.mark.parametrize("how", ["svd", "linear", "cat", "ties"])
def test_one_adapter_is_scaled_exactly(weight, how):
    model = build("llama", {"use_rslora": True})
    model.add_weighted_adapter(["a0"], [weight], "new", how, density=0.5)
    assert error(model, {"a0": weight}) < 2e-6


PRUNING = ["ties", "dare_ties", "dare_linear", "magnitude_prune"]


@pytest.mark.parametrize("how", PRUNING)
def test_pruning_types_merge_factors_or_updates(how, monkeypatch):
    """A and B apart with the roots of the weights, or (svd) the whole updates."""
    monkeypatch.setattr(torch, "bernoulli", lambda p: (torch.arange(p.numel()).view(p.shape) % 3 == 0).to(p.dtype))
    model = build("llama", {}, {"lora_alpha": 2})
    layer = model.base_model.layers["model.layers.0.self_attn.q_proj"]
    merge, rest = getattr(merge_utils, how), ["frequency"] if how.endswith("ties") else []
    options = {"density": 0.4, "majority_sign_method": "frequency"}
    model.add_weighted_adapter(["a0", "a1"], [0.7, -0.4], "new", how, **options)
    roots = torch.tensor([1.4**0.5, -(0.2**0.5)])
    torch.testing.assert_close(
        layer.lora_A["new"].weight, merge([layer.lora_A[a].weight for a in ("a0", "a1")], roots, 0.4, *rest)
    )
    torch.testing.assert_close(
        layer.lora_B["new"].weight, merge([layer.lora_B[a].weight for a in ("a0", "a1")], roots.abs(), 0.4, *rest)
    )
    model.add_weighted_adapter(["a0", "a1"], [0.7, -0.4], "whole", f"{how}_svd", svd_rank=16, **options)
    deltas = [layer.get_delta_weight(a) for a in ("a0", "a1")]
    torch.testing.assert_close(
        layer.get_delta_weight("whole"), merge(deltas, torch.tensor([0.7, -0.4]), 0.4, *rest), atol=1e-5, rtol=1e-5
    )


def test_svd_clamp_cuts_the_factors():
    model = build("llama", {}, {})
    with pytest.warns(PeftWarning, match="is off by"):
        model.add_weighted_adapter(["a0", "a1"], [1, 1], "new", "svd", svd_clamp=0.9)
    B = model.base_model.layers["model.layers.0.self_attn.q_proj"].lora_B["new"].weight.abs()
    assert B.eq(B.max()).sum() > 3


def test_biases_add_up():
    """The outputs of the new adapter are the weighted sum of what the old ones add, biases included."""
    model = build("mlp", {"lora_bias": True}, {}, targets=["lin0"])
    x, outputs = models.inputs("mlp")["x"], {}
    model.add_weighted_adapter(["a0", "a1"], [0.7, -0.4], "new", "cat")
    layer = model.base_model.layers["lin0"]
    for name in ("a0", "a1", "new"):
        layer.set_adapter(name)
        outputs[name] = layer(x) - layer.base_layer(x)
    torch.testing.assert_close(outputs["new"], 0.7 * outputs["a0"] - 0.4 * outputs["a1"])


def test_grouped_convolutions_concatenate_within_groups():
    model = build("convs", {}, {"r": 2}, targets=["grouped"])
    x, outputs = models.noise((2, 4, 5, 5), 3), {}
    model.add_weighted_adapter(["a0", "a1"], [0.7, -0.4], "new", "cat")
    layer = model.base_model.layers["grouped"]
    for name in ("a0", "a1", "new"):
        layer.set_adapter(name)
        outputs[name] = layer(x) - layer.base_layer(x)
    torch.testing.assert_close(outputs["new"], 0.7 * outputs["a0"] - 0.4 * outputs["a1"])
    with pytest.raises(AdapterError, match="groups"):
        model.add_weighted_adapter(["a0", "a1"], [1, 1], "other", "svd")


def test_tied_layers_stay_tied():
    kwargs = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
    model = build("llama_tied", kwargs, kwargs)
    model.add_weighted_adapter(["a0", "a1"], [0.7, -0.4], "new", "cat")
    assert error(model, {"a0": 0.7, "a1": -0.4}) < 2e-6


def test_whole_modules_and_token_rows_come_along():
    """Upstream's new adapter got the untrained module."""
    model = build("llama_classifier", {"modules_to_save": ["score"]}, {"trainable_token_indices": [1, 2]})
    model.add_weighted_adapter(["a0", "a1"], [0.7, -0.4], "new", "cat")
    trained = dict(model.named_parameters())
    score = "base_model.model.score.modules_to_save.{}.weight"
    rows = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta.{}"
    assert trained[score.format("new")].equal(trained[score.format("a0")])
    assert trained[rows.format("new")].equal(trained[rows.format("a1")])


def test_an_existing_name_is_left_alone():
    model = build("llama", {}, {})
    before = snapshot(model, trainable=True)
    assert model.add_weighted_adapter(["a0", "a1"], [1, 1], "a1", "cat") is None
    assert all(before[n].equal(p) for n, p in model.named_parameters() if n in before)


REFUSED = {
    "ranks": ([{}, {"r": 2}], {"combination_type": "linear"}, "same r"),
    "ranks of one layer": ([{"rank_pattern": {"q_proj": 2}}, {}], {"combination_type": "ties", "density": 1}, "same r"),
    "density": ([{}, {}], {"combination_type": "ties"}, "density"),
    "unknown type": ([{}, {}], {"combination_type": "mean"}, "Invalid combination_type"),
    "unknown adapter": ([{}, {}], {"adapters": ["a0", "zz"]}, "zz does not exist"),
    "lengths": ([{}, {}], {"weights": [1]}, "one weight"),
    "nan": ([{}, {}], {"weights": [1, float("nan")]}, "finite"),
    "target kinds": ([{"target_modules": ".*q_proj"}, {}], {"combination_type": "cat"}, "mix of list/set and string"),
    "whole modules": ([{"modules_to_save": ["lm_head"]}] * 2, {"combination_type": "cat"}, "modules_to_save"),
    "dora": ([{"use_dora": True}, {}], {"combination_type": "cat"}, "DoRA"),
    "pruned start": ([{"init_lora_weights": "olora"}, {}], {"combination_type": "ties", "density": 1}, "ties_svd"),
    "base biases": ([{"bias": "all"}, {}], {"combination_type": "cat"}, "Only one adapter"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_leave_no_trace(case):
    configs, options, message = REFUSED[case]
    model = build("llama", *configs)
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(**{"adapters": ["a0", "a1"], "weights": [1, 1], "adapter_name": "new", **options})
    assert list(model.peft_config) == ["a0", "a1"]
    assert list(model.state_dict()) == before


def test_bare_parameters_are_refused():
    kwargs = {"target_modules": ["lin"], "target_parameters": ["experts.w1"]}
    model = build("parameters", kwargs, kwargs)
    with pytest.raises(ValueError, match="does not support targeting"):
        model.add_weighted_adapter(["a0", "a1"], [1, 1], "new", "cat")


def test_the_result_can_be_saved_and_loaded(tmp_path):
    model = build("llama", {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}})
    model.add_weighted_adapter(["a0", "a1"], [0.7, -0.4], "new", "cat")
    model.set_adapter("new")
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    assert json.loads((tmp_path / "new" / "adapter_config.json").read_text())["r"] == 8
    loaded = PeftModel.from_pretrained(models.build("llama"), tmp_path / "new")
    torch.testing.assert_close(models.run(loaded, "llama"), models.run(model, "llama"))


def test_merge_utils_against_worked_examples():
    """Numbers by hand, from the papers' definitions."""
    t = torch.tensor([[1.0, -2.0, 0.0, 0.5], [-1.5, -3.0, 0.0, 1.0], [3.0, 1.0, 0.0, -2.0]])
    w = torch.tensor([1.0, 2.0, 0.5])
    assert merge_utils.magnitude_based_pruning(t[1], 0.5).tolist() == [-1.5, -3, 0, 0]
    mask = merge_utils.calculate_majority_sign_mask(t)
    assert mask.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 1]]
    assert merge_utils.calculate_majority_sign_mask(t, "frequency")[:, 3].tolist() == [1, 1, 0]
    assert merge_utils.calculate_majority_sign_mask(torch.tensor([[1.0], [-1.0]])).tolist() == [[1], [0]]  # a draw
    assert merge_utils.disjoint_merge(t, mask).tolist() == [2, -2.5, 0, -2]
    assert merge_utils.task_arithmetic(list(t), w).tolist() == [-0.5, -7.5, 0, 1.5]
    assert merge_utils.ties(list(t), w, 0.5).tolist() == [1.25, -4, 0, -1]
    assert merge_utils.random_pruning(t, 1.0, rescale=True).equal(t)
    with pytest.warns(UserWarning, match="keeps everything"):
        assert merge_utils.prune(t, 1.5, "random") is t
    with pytest.raises(ValueError, match="Density"):
        merge_utils.prune(t, -0.5, "magnitude")
    with pytest.raises(ValueError, match="Unknown method"):
        merge_utils.prune(t, 0.5, "other")
