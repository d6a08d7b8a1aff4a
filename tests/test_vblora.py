"""VB-LoRA's small files: which tensors they hold, what comes back, and what cannot be done with it."""

from __future__ import annotations

import pytest
import torch
from laws_table import BY_NAME, gap, quiet, wrapped
from safetensors.torch import load_file, save_file

import peft
from peft.errors import CheckpointError, ConfigError
from peft.methods.vblora import index_dtype

EXAMPLE = BY_NAME["vblora"]
FILE = "adapter_model.safetensors"
A = "base_model.model.lin0.vblora_logits_A"


def small(**config):
    return wrapped(EXAMPLE, save_only_topk_weights=True, **config)


@pytest.mark.parametrize("k", [1, 2, 4])
@torch.no_grad()
@quiet
def test_a_small_file_gives_the_mixtures_back(k, tmp_path):
    model, x = small(topk=k), EXAMPLE.inputs()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    logits = model.base_model.layers["lin0"].vblora_logits_A["default"]
    top = logits.topk(k, dim=-1)
    assert A not in tensors and torch.equal(tensors[f"{A}_topk_indices"].long(), top.indices)
    assert gap(tensors[f"{A}_topk_weights"], top.values.softmax(-1)[..., :-1]) < 1e-6 if k > 1 else True
    assert tensors[f"{A}_topk_weights"].shape[-1] == k - 1
    before = {key: t.clone() for key, t in tensors.items()}
    for low in (False, True):
        loaded = peft.PeftModel.from_pretrained(EXAMPLE.make_base(), tmp_path, low_cpu_mem_usage=low)
        assert gap(loaded(x), model(x)) < 2e-6
        peft.set_peft_model_state_dict(loaded, tensors)
        assert tensors.keys() == before.keys() and all(torch.equal(tensors[n], t) for n, t in before.items())
        again = peft.get_peft_model_state_dict(loaded)
        assert again.keys() == tensors.keys()
        assert all(gap(again[n], t) < 3e-7 if t.numel() else True for n, t in tensors.items())


@pytest.mark.parametrize(
    ("vectors", "dtype"), [(255, torch.uint8), (256, torch.int16), (32767, torch.int16), (32768, torch.int32)]
)
def test_indices_have_the_smallest_dtype(vectors, dtype):
    assert index_dtype(vectors) is dtype and index_dtype(1 << 31) is torch.int64
    assert torch.iinfo(dtype).max >= vectors - 1


@quiet
def test_training_after_a_small_file_is_an_error(tmp_path):
    x = EXAMPLE.inputs()
    small().save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(EXAMPLE.make_base(), tmp_path, is_trainable=True).eval()
    for _ in range(2):
        model(x)
        with pytest.raises(RuntimeError, match="save_only_topk_weights"):
            model.train()(x)
        model.eval()
    peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(wrapped(EXAMPLE)))  # all logits
    model.train()(x).sum().backward()
    peft.set_peft_model_state_dict(model, load_file(tmp_path / FILE))
    with pytest.raises(RuntimeError, match="save_only_topk_weights"):
        model(x)


@quiet
def test_weights_that_rounding_made_zero_stay_finite(tmp_path):
    model, x = small(topk=3), EXAMPLE.inputs()
    with torch.no_grad():
        model.base_model.layers["lin0"].vblora_logits_A["default"].mul_(300)
    model.save_pretrained(tmp_path)
    assert gap(peft.PeftModel.from_pretrained(EXAMPLE.make_base(), tmp_path)(x).detach(), model(x).detach()) < 1e-5


BREAK = {
    "outside": lambda t: t.update({f"{A}_topk_indices": t[f"{A}_topk_indices"] + 100}),
    "no_weights": lambda t: t.pop(f"{A}_topk_weights"),
    "short": lambda t: t.update({f"{A}_topk_weights": t[f"{A}_topk_weights"][:1]}),
}


@pytest.mark.parametrize("how", BREAK)
@quiet
def test_damaged_small_files_are_refused(how, tmp_path):
    small().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    BREAK[how](tensors)
    save_file(tensors, tmp_path / FILE, {"format": "pt"})
    with pytest.raises(CheckpointError, match="topk_indices"):
        peft.PeftModel.from_pretrained(EXAMPLE.make_base(), tmp_path)


def test_counts_what_a_file_holds(capsys):
    """One layer 16 -> 24 in parts of 4, rank 2: 8 mixtures for A and 12 for B, from 7 vectors."""
    config = {"target_modules": ["lin0"], "vector_length": 4, "modules_to_save": ["lin1"]}
    whole, few = wrapped(EXAMPLE, **config), small(**config)
    assert whole.get_nb_savable_parameters() == (20 * 7 + 28, 24 * 5 + 5)
    assert few.get_nb_savable_parameters() == (20 + 20 * 2 / 4 + 28, 24 * 5 + 5)
    few.print_savable_parameters()
    assert "58" in capsys.readouterr().out


def test_one_vector_a_mixture_is_that_vector():
    model = wrapped(EXAMPLE, topk=1)
    layer = model.base_model.layers["lin0"]
    A, _ = layer.adapters["default"].factors()
    bank = model.base_model.vblora_vector_bank["default"]
    assert torch.equal(A, bank[layer.vblora_logits_A["default"].argmax(-1)].flatten(1))


@pytest.mark.parametrize(("field", "value"), [("r", 0), ("topk", 8), ("vector_length", 3), ("vblora_dropout", 2.0)])
def test_wrong_values_name_their_field(field, value):
    with pytest.raises(ConfigError, match=field):
        wrapped(EXAMPLE, **{field: value})
