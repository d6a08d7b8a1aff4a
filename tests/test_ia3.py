"""What the laws do not say of (IA)³: which layers scale their input, and weighted sums of adapters."""

from __future__ import annotations

import models
import pytest
import torch
from torch import nn

import peft
from peft import IA3Config


def factors(model):
    """{(layer, adapter): factors} of a model."""
    layers = model.base_model.layers.items()
    return {(path, name): a.ia3_l.detach() for path, layer in layers for name, a in layer.adapters.items()}


def pair(first, second, base="mlp"):
    """A model with two adapters, "default" and "b", moved from their start."""
    model = peft.get_peft_model(models.build(base), IA3Config(**first)).eval()
    model.add_adapter("b", IA3Config(**second))
    with torch.no_grad():
        for i, t in enumerate(factors(model).values()):
            t.add_(models.noise(t.shape, i) * 0.3)
    return model


@pytest.mark.parametrize(
    ("targets", "feedforward", "scaled"),
    [
        (["k_proj", "down_proj"], ["down_proj"], {"down_proj"}),
        (".*(k_proj|down_proj)", ".*down_proj", {"down_proj"}),
        (".*(k_proj|down_proj)", "down_proj", set()),  # a regex is for the whole name
        (".*(k_proj|down_proj)", ["proj"], {"k_proj", "down_proj"}),
        (["k_proj", "mlp.down_proj"], None, {"down_proj"}),
        (["k_proj"], None, set()),
        (["k_proj", "down_proj"], [], set()),
    ],
)
def test_layers_that_scale_their_input(targets, feedforward, scaled, tmp_path):
    config = IA3Config(target_modules=targets, feedforward_modules=feedforward)
    model = peft.get_peft_model(models.build("llama"), config)
    found = {
        path.rpartition(".")[2] for path, layer in model.base_model.layers.items() if layer.is_feedforward["default"]
    }
    assert found == scaled
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(models.build("llama"), tmp_path)
    assert factors(again).keys() == factors(model).keys()


def test_wrong_feedforward_modules_are_named():
    with pytest.raises(peft.PeftError, match="feedforward_modules should be a subset"):
        IA3Config(target_modules=["a"], feedforward_modules=["b"])
    with pytest.raises(peft.PeftError, match="specify `feedforward_modules`"):
        peft.get_peft_model(models.build("mlp"), IA3Config(target_modules=["lin0"]))


def test_many_targets_stay_as_they_were_written(tmp_path):
    """Condensed to endings, they would no longer contain feedforward_modules, and the file could not be read."""
    base = lambda: models.fill(nn.Sequential(*(nn.Linear(4, 4) for _ in range(24))))  # noqa: E731
    names = [str(i) for i in range(22)]
    model = peft.get_peft_model(base(), IA3Config(target_modules=names, feedforward_modules=names[3:5]))
    assert model.peft_config["default"].target_modules == set(names)
    model.save_pretrained(tmp_path)
    assert len(peft.PeftModel.from_pretrained(base(), tmp_path).base_model.layers) == 22


BOTH = {"target_modules": ["lin0", "lin1"], "feedforward_modules": ["lin1"]}
ONE = {"target_modules": ["lin0"], "feedforward_modules": []}


@pytest.mark.parametrize("second", [BOTH, ONE], ids=["same_layers", "fewer_layers"])
def test_weighted_sums_of_factors(second):
    model = pair(BOTH, second)
    model.base_model.add_weighted_adapter(["default", "b"], [0.3, 0.6], "sum")
    found = factors(model)
    for path in ("lin0", "lin1"):
        other = found.get((path, "b"), torch.ones(()))
        torch.testing.assert_close(found[path, "sum"], 0.3 * found[path, "default"] + 0.6 * other)
    assert model.active_adapters == ["default"]
    x = models.inputs("mlp")["x"]
    before = model(x)
    model.set_adapter("sum")
    assert not torch.equal(model(x), before)


def test_weighted_sums_cover_the_layers_of_all():
    model = pair(ONE, {"target_modules": ["lin1"], "feedforward_modules": ["lin1"]})
    model.base_model.add_weighted_adapter(["default", "b"], [1.0, 2.0], "sum")
    found = factors(model)
    torch.testing.assert_close(found["lin0", "sum"], found["lin0", "default"] + 2)
    torch.testing.assert_close(found["lin1", "sum"], 1 + 2 * found["lin1", "b"])
    model = pair(
        {"target_modules": ".*proj", "feedforward_modules": ".*down_proj", "exclude_modules": ".*layers.0.*"},
        {"target_modules": ".*k_proj", "feedforward_modules": "none"},
        "llama",
    )
    model.base_model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "sum")
    found = factors(model)
    assert {p for p, n in found if n == "sum"} == {p for p, n in found if n in ("default", "b")}


@pytest.mark.parametrize(
    ("second", "adapters", "weights", "message"),
    [
        ({"target_modules": ["lin0", "lin1"], "feedforward_modules": []}, ["default", "b"], [1, 1], "input and others"),
        (BOTH, ["default", "x"], [1, 1], "x does not exist"),
        (BOTH, ["default", "b"], [1], "one weight"),
        (BOTH, ["default", "b"], [1, float("nan")], "finite"),
        ({"target_modules": "lin.", "feedforward_modules": []}, ["default", "b"], [1, 1], "same target modules type"),
    ],
)
def test_what_cannot_be_summed_leaves_the_model_as_it_was(second, adapters, weights, message):
    model = pair(BOTH, second)
    names = [n for n, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=message):
        model.base_model.add_weighted_adapter(adapters, weights, "sum")
    assert [n for n, _ in model.named_parameters()] == names and list(model.peft_config) == ["default", "b"]
    model.base_model.add_weighted_adapter(["b"], [2.0], "default")  # the name exists: nothing happens
    assert [n for n, _ in model.named_parameters()] == names
