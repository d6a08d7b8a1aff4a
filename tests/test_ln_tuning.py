"""What the laws do not say of modules replaced whole: one at a time, while merged, with buffers of their own."""

from __future__ import annotations

import models
import pytest
import torch
from torch import nn

import peft
from peft import LNTuningConfig
from peft.errors import AdapterError, MergeError

X = models.noise((4, models.WIDTH), 7)


class Norm(nn.Module):
    """A norm with a buffer that no state_dict holds, and an optional second input."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(models.WIDTH))
        self.register_buffer("scale", torch.full((models.WIDTH,), 3.0), persistent=False)

    def forward(self, x, shift=0):
        return x * self.weight * self.scale + shift


class Model(nn.Module):
    """Two norms, the second inside of a block, and a head."""

    def __init__(self):
        super().__init__()
        self.norm = Norm()
        self.block = nn.Sequential(nn.Linear(models.WIDTH, models.WIDTH), nn.LayerNorm(models.WIDTH))
        self.head = nn.Linear(models.WIDTH, 3)

    def forward(self, x, **more):
        return self.head(self.block(self.norm(x, **more)))


def wrapped(*targets, adapters=("default",), base=None):
    """A model in which every adapter's copies are moved from their start."""
    base = models.fill(Model()) if base is None else base
    model = peft.get_peft_model(base, LNTuningConfig(target_modules=list(targets)), adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, LNTuningConfig(target_modules=list(targets)))
    for i, (name, p) in enumerate(model.named_parameters()):
        if "ln_tuning" in name:
            p.data.add_(models.noise(p.shape, i) * 0.3)
    return model.eval()


def test_two_adapters_cannot_act_at_once():
    model = wrapped("norm", adapters=("default", "b"))
    model.base_model.set_adapter(["default", "b"])
    with pytest.raises(AdapterError, match=r"Only one adapter can take the place of norm, but \['default', 'b'\]"):
        model(X)
    with pytest.raises(AdapterError, match="'default' is merged into norm"):
        model.merge_adapter()
    assert not any(layer.merged for layer in model.base_model.layers.values())
    model.set_adapter("default")
    model.merge_adapter(["b"])
    with pytest.raises(AdapterError, match="Only one adapter"):
        model(X)


def test_adapters_on_different_modules_act_together():
    model = wrapped("norm", adapters=("default",))
    model.add_adapter("b", LNTuningConfig(target_modules=["head"]))
    before = model(X)
    model.set_adapter("b")  # upstream fails here: "b" has no copy of the norm
    model(X)
    model.base_model.set_adapter(["default", "b"])
    assert torch.equal(model(X), before)


@pytest.mark.parametrize("safe", [False, True])
def test_broken_copies_are_not_merged(safe):
    model = wrapped("block")
    model.base_model.layers["block"].ln_tuning_layers["default"][0].weight.data[0, 0] = float("nan")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(MergeError, match="NaN"):
        model.merge_adapter(safe_merge=safe)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if "base_layer" in k)


def test_moving_while_merged_moves_what_was_put_aside():
    model = wrapped("norm", "block")
    wanted = {k: v.double() for k, v in model.get_base_model().state_dict().items() if "ln_tuning" not in k}
    model.merge_adapter()
    merged = model.state_dict()
    assert not all(torch.equal(v, merged[f"base_model.model.{k}"].double()) for k, v in wanted.items())
    model.double()
    model.unmerge_adapter()
    found = model.get_base_model().state_dict()
    assert all(torch.equal(found[k], v) for k, v in wanted.items())


def test_an_adapter_added_while_another_is_merged_starts_as_the_base():
    model = wrapped("norm", "block")
    model.merge_adapter()
    model.add_adapter("b", LNTuningConfig(target_modules=["norm", "block"]))
    model.unmerge_adapter()
    model.set_adapter("b")
    torch.testing.assert_close(model(X), models.fill(Model())(X), rtol=0, atol=0)


@pytest.mark.parametrize("config", [LNTuningConfig, peft.LoraConfig], ids=["whole", "modules_to_save"])
def test_buffers_that_no_file_holds_survive_loading(config, tmp_path):
    options = {"target_modules": ["norm"]} if config is LNTuningConfig else {"modules_to_save": ["norm"]}
    model = peft.get_peft_model(models.fill(Model()), config(**{"target_modules": ["head"], **options})).eval()
    models.perturb(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(models.fill(Model()), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(again(X), model(X))


def test_files_of_blocks_load_under_any_name(tmp_path):
    model = wrapped("block", adapters=("first", "b"))
    model.save_pretrained(tmp_path)
    model.set_adapter("b")
    again = peft.PeftModel.from_pretrained(models.fill(Model()), tmp_path / "b", adapter_name="other")
    assert torch.equal(again(X), model(X))


def test_what_cannot_be_done_says_so():
    model = wrapped("norm", adapters=("default", "b"))
    with pytest.raises(AdapterError, match="Run one batch per adapter"):
        model(X, shift=1.0, adapter_names=["default", "b", "b", "default"])
    assert not torch.equal(model(X, shift=1.0), model(X))
    base = Model()
    base.norm.weight = nn.Parameter(torch.ones(models.WIDTH, dtype=torch.int8), requires_grad=False)
    with pytest.raises(peft.PeftError, match="norm cannot be trained whole"):
        wrapped("norm", base=base)
