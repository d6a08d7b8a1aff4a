"""VB-LoRA's small files: what they hold, and that they are not trained by mistake."""

from __future__ import annotations

import models
import pytest
import torch
from laws_table import gap, train_a_little

import peft

CONFIG = {"r": 2, "num_vectors": 8, "vector_length": 4, "topk": 2, "target_modules": ["lin0"], "init_vector_bank_bound": 1.0}


def trained(**changes):
    model = peft.get_peft_model(models.fill(models.Mlp()), peft.VBLoRAConfig(**{**CONFIG, **changes}))
    train_a_little(model)
    return model.eval()


@pytest.mark.parametrize("count", [8, 300])
def test_a_small_file_computes_the_same_and_is_not_trained(count, tmp_path):
    model, x = trained(num_vectors=count, save_only_topk_weights=True), models.noise((6, models.WIDTH), 7)
    model.save_pretrained(tmp_path)
    tensors = peft.load_peft_weights(tmp_path)
    before = {k: t.clone() for k, t in tensors.items()}
    assert {k.rpartition("_topk_")[2] or k for k in tensors if "bank" not in k} == {"indices", "weights"}
    assert {t.dtype for k, t in tensors.items() if "indices" in k} == {torch.uint8 if count == 8 else torch.int16}
    loaded = peft.PeftModel.from_pretrained(models.fill(models.Mlp()), tmp_path, is_trainable=True)
    assert gap(loaded.eval()(x), model(x)) < 1e-6
    with pytest.raises(RuntimeError, match="save_only_topk_weights"):
        loaded.train()(x)
    peft.set_peft_model_state_dict(loaded, tensors)
    assert all(torch.equal(tensors[k], before[k]) for k in before), "a load must not change what it is given"


def test_savable_numbers():
    model = trained()
    pieces = 2 * (16 // 4) + 2 * (24 // 4)
    assert model.base_model.get_nb_savable_parameters() == (32 + pieces * 8, 0)
    small = trained(save_only_topk_weights=True)
    assert small.base_model.get_nb_savable_parameters() == (32 + int(pieces * 1 + pieces * 2 / 4), 0)


def test_vectors_must_fit():
    with pytest.raises(ValueError, match="vector_length"):
        trained(vector_length=5)
    with pytest.raises(ValueError, match="topk"):
        trained(topk=9)
