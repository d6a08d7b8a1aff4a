"""What the laws do not say of SHiRA: who chooses the entries, files with unusual entries, few rows, scaling."""

from __future__ import annotations

import json

import models
import pytest
import torch
from safetensors.torch import load_file, save_file

import peft
from peft import ShiraConfig
from peft.errors import CheckpointError, ConfigError
from peft.ops import folded

X = models.inputs("mlp")["x"]


def wrapped(mask_fn=None, **config):
    """The MLP with trained entries in its first layer."""
    config = ShiraConfig(**{"r": 1, "target_modules": ["lin0"], **config})
    config.mask_fn = mask_fn or config.mask_fn
    model = peft.get_peft_model(models.build("mlp"), config).eval()
    models.perturb(model, scale=0.5)
    return model


def first_rows(base_layer, r, **options):
    """A mask of the first entries, as a program may define it."""
    mask = torch.zeros_like(base_layer.weight)
    mask.view(-1)[: r * sum(base_layer.weight.shape)] = 1
    return mask


def test_a_function_chooses_the_entries(tmp_path):
    seen = {}
    model = wrapped(
        lambda base, r, **options: first_rows(base, r, **seen.setdefault("options", options)), random_seed=4
    )
    assert seen["options"] == {"random_seed": 4}
    layer = model.base_model.layers["lin0"]
    delta = layer.get_delta_weight("default")
    assert delta.flatten()[:40].all() and not delta.flatten()[40:].any()
    model.save_pretrained(tmp_path)
    assert "mask_fn" not in json.loads((tmp_path / "adapter_config.json").read_text())
    assert torch.equal(peft.PeftModel.from_pretrained(models.build("mlp"), tmp_path)(X), model(X))


@pytest.mark.parametrize(
    ("mask_fn", "found"),
    [
        (lambda base, r, **_: torch.ones(3, 3), r"got shape \(3, 3\) with 9"),
        (lambda base, r, **_: torch.zeros_like(base.weight), r"got shape \(24, 16\) with 0"),
    ],
)
def test_wrong_masks_are_refused(mask_fn, found):
    with pytest.raises(ConfigError, match=rf"mask_fn must return a mask of shape \(24, 16\) with 40 ones.*{found}"):
        wrapped(mask_fn)


def test_wrong_ranks_are_refused():
    with pytest.raises(ConfigError, match=r"ShiraConfig\.r must be at least 1"):
        ShiraConfig(r=0)
    with pytest.raises(ConfigError, match=r"r=40 asks for 1600 entries of lin0, which has 384"):
        wrapped(r=40)


def test_the_choice_depends_on_its_seed_alone():
    def chosen(**config):
        return wrapped(**config).base_model.layers["lin0"].shira_indices["default"].clone()

    torch.manual_seed(1)
    before = chosen()
    torch.manual_seed(2)
    assert torch.equal(chosen(), before)
    assert torch.equal(chosen(random_seed=3), chosen(random_seed=3))
    assert not torch.equal(chosen(random_seed=3), before)


def change_file(folder, change):
    """Rewrite the tensors of an adapter file; returns the key of the indices."""
    tensors = load_file(folder / "adapter_model.safetensors")
    key = next(k for k in tensors if k.endswith("indices"))
    change(tensors, key, key.replace("indices", "weight"))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"})


def shuffle(tensors, indices, values):
    order = torch.randperm(tensors[values].numel())
    tensors[indices], tensors[values] = tensors[indices][:, order], tensors[values][order]


def as_floats(tensors, indices, values):
    tensors[indices] = tensors[indices].float()


@pytest.mark.parametrize("change", [shuffle, as_floats])
def test_files_with_entries_in_any_order_or_as_floats(change, tmp_path):
    """Upstream writes float32 indices on Windows."""
    model = wrapped()
    model.save_pretrained(tmp_path)
    change_file(tmp_path, change)
    with torch.no_grad():
        again = peft.PeftModel.from_pretrained(models.build("mlp"), tmp_path)
        torch.testing.assert_close(again(X), model(X))
    assert again.base_model.layers["lin0"].shira_indices["default"].dtype is torch.int32


@pytest.mark.parametrize(
    "change",
    [
        lambda t, k, _: t[k][0].__setitem__(0, 24),
        lambda t, k, _: t[k][1].__setitem__(3, -1),
        lambda t, k, _: t[k].__setitem__((slice(None), 1), t[k][:, 0]),
    ],
    ids=["row", "column", "twice"],
)
def test_files_with_wrong_entries_are_refused(change, tmp_path):
    wrapped().save_pretrained(tmp_path)
    change_file(tmp_path, change)
    base = models.build("mlp")
    with pytest.raises(CheckpointError, match="entries outside of the weight"):
        peft.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(base(X), models.build("mlp")(X))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_few_rows_compute_what_many_do(dtype, monkeypatch):
    monkeypatch.setattr(folded, "enabled", False)
    model = wrapped(r=4).to(dtype)
    layer = model.base_model.layers["lin0"]
    x = models.noise((64, models.WIDTH), 3).to(dtype)
    many, few = layer(x), torch.cat([layer(part) for part in x.split(3)])
    torch.testing.assert_close(
        few, many, rtol=2e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-2 if dtype is torch.bfloat16 else 1e-6
    )


@torch.no_grad()
def test_scaling():
    model = wrapped()
    layer = model.base_model.layers["lin0"]
    x = models.noise((5, models.WIDTH), 3)
    base, full = layer.get_base_layer()(x), layer(x)
    layer.set_scale("default", 0.25)
    torch.testing.assert_close(layer(x), base + 0.25 * (full - base))
    layer.unscale_layer()
    torch.testing.assert_close(layer(x), full)
