"""Frozen bases that follow from a seed: in the file or not, the same for all adapters of a model."""

from __future__ import annotations

import pytest
import torch
from laws_table import BY_NAME, quiet, wrapped
from safetensors.torch import load_file, save_file

import peft
from peft.errors import CheckpointError, ConfigError

FILE = "adapter_model.safetensors"
each = pytest.mark.parametrize("example", [BY_NAME[n] for n in ("vera", "pvera", "randlora")], ids=str)


def bases(example, tensors):
    return [k for k in tensors if k.endswith(wrapped(example).base_model.layers["lin0"].adapter_cls.bases)]


@each
@quiet
def test_a_file_without_bases_says_so(example, tmp_path):
    model, x = wrapped(example, save_projection=False, projection_prng_key=9), example.inputs()
    model.save_pretrained(tmp_path)
    assert not bases(example, load_file(tmp_path / FILE))
    for low in (False, True):
        loaded = peft.PeftModel.from_pretrained(example.make_base(), tmp_path, low_cpu_mem_usage=low)
        assert torch.equal(loaded(x), model(x))


@each
@quiet
def test_bases_missing_without_a_word_are_an_error(example, tmp_path):
    wrapped(example).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    assert len(bases(example, tensors)) >= 2
    save_file({k: v for k, v in tensors.items() if k not in bases(example, tensors)}, tmp_path / FILE)
    with pytest.raises(CheckpointError, match="save_projection=False"):
        peft.PeftModel.from_pretrained(example.make_base(), tmp_path)


@each
@torch.no_grad()
@quiet
def test_bases_come_from_the_file_where_it_holds_them(example, tmp_path):
    model, x = wrapped(example), example.inputs()
    for base in model.base_model.shared.values():
        base["default"].mul_(2)
    model.save_pretrained(tmp_path)
    assert torch.equal(peft.PeftModel.from_pretrained(example.make_base(), tmp_path)(x), model(x))


@each
@pytest.mark.parametrize(
    "change", [{"projection_prng_key": 3}, {"save_projection": False}], ids=lambda c: next(iter(c))
)
def test_adapters_of_a_model_agree_on_their_bases(example, change):
    model = wrapped(example)
    with pytest.raises(ConfigError, match=next(iter(change))):
        model.add_adapter("second", example.make_config(**change))
    assert list(model.peft_config) == ["default"]
