"""What the laws do not say of SuperTuning: which entries are trained, files without them, wrong settings, few rows."""

from __future__ import annotations

import warnings

import models
import pytest
import torch
from safetensors.torch import load_file, save_file

import peft
from peft import SupertuningConfig
from peft.errors import CheckpointError, ConfigError, PeftWarning
from peft.ops import folded

X = models.inputs("mlp")["x"]


def wrapped(**config):
    """The MLP with trained entries in its first layer."""
    config = SupertuningConfig(**{"sparsity": 0.9, "target_modules": ["lin0"], **config})
    model = peft.get_peft_model(models.build("mlp"), config).eval()
    models.perturb(model, scale=0.5)
    return model


@pytest.mark.parametrize("select_top", [True, False])
def test_the_largest_or_smallest_entries_are_trained(select_top):
    layer = wrapped(select_top=select_top).base_model.layers["lin0"]
    changed = layer.get_delta_weight("default") != 0
    size = layer.base_weight().abs()
    assert changed.sum() == 38  # a tenth of 384, rounded down
    if select_top:
        assert size[changed].min() >= size[~changed].max()
    else:
        assert size[changed].max() <= size[~changed].min()


def test_files_without_indices_follow_the_base(tmp_path):
    with pytest.warns(PeftWarning, match="bitwise the same base weights"):
        model = wrapped(save_precomputed_indices=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)
        path = tmp_path / "adapter_model.safetensors"
        tensors = load_file(path)
        assert [k.rpartition(".")[2] for k in tensors] == ["supertuning_values"]
        assert torch.equal(peft.PeftModel.from_pretrained(models.build("mlp"), tmp_path)(X), model(X))
        key = next(iter(tensors)).replace("values", "indices")
        save_file({**tensors, key: torch.arange(38, dtype=torch.int32)}, path, {"format": "pt"})
        assert torch.equal(peft.PeftModel.from_pretrained(models.build("mlp"), tmp_path)(X), model(X))


@pytest.mark.parametrize("wrong", [384, -1, "twice"])
def test_files_with_wrong_entries_are_refused(wrong, tmp_path):
    wrapped().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    indices = next(t for k, t in tensors.items() if k.endswith("indices"))
    indices[3] = indices[7] if wrong == "twice" else wrong
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="entries outside of the weight"):
        peft.PeftModel.from_pretrained(models.build("mlp"), tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sparsity": 1.0}, "sparsity must be below 1"),
        ({"sparsity": -0.1}, "sparsity must be at least 0"),
        ({"r": 0}, "r must be at least 1"),
        ({"lora_alpha": 2.0}, "lora_alpha needs r"),
        ({"r": 2, "lora_alpha": float("nan")}, "lora_alpha must be a finite number"),
        ({"lora_dropout": 1.5}, "lora_dropout must be at least 0 and at most 1"),
        ({"sparsity": 0.999}, "sparsity=0.999 leaves none of the 384 entries of lin0"),
    ],
)
def test_wrong_settings_are_named(config, message):
    with pytest.raises(ConfigError, match=message):
        wrapped(**config)


def test_the_scaling_is_two_unless_alpha_says_otherwise():
    assert SupertuningConfig(r=3).lora_alpha == 6
    assert SupertuningConfig(r=3, lora_alpha=1.5).lora_alpha == 1.5
    assert SupertuningConfig().lora_alpha is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("r", [None, 3])
@torch.no_grad()
def test_few_rows_compute_what_many_do(dtype, r, monkeypatch):
    monkeypatch.setattr(folded, "enabled", False)
    layer = wrapped(r=r).to(dtype).base_model.layers["lin0"]
    x = models.noise((64, models.WIDTH), 3).to(dtype)
    many, few = layer(x), torch.cat([layer(part) for part in x.split(3)])
    half = dtype is torch.bfloat16
    torch.testing.assert_close(few, many, rtol=2e-2 if half else 1e-5, atol=2e-2 if half else 1e-5)
    layer.supertuning_indices["default"].copy_(torch.arange(38))  # what was sorted for few rows is sorted anew
    many, few = layer(x), torch.cat([layer(part) for part in x.split(3)])
    torch.testing.assert_close(few, many, rtol=2e-2 if half else 1e-5, atol=2e-2 if half else 1e-5)
