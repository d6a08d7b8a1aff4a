"""Linear layers whose weights oneDNN keeps in its own order; the laws on them are in laws/test_quantized.py."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from helpers import chat_llama
from torch import nn

import peft
from peft.errors import AdapterError, BaseMismatchError, PeftWarning
from peft.quant.onednn import PackedLinear

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def test_a_packed_model_computes_the_same_and_keeps_its_embeddings():
    model = chat_llama().eval()
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        wanted = model(ids).logits
    linears = sum(type(m) is nn.Linear for m in model.modules())
    assert peft.pack_linears(model) == linears > 0
    assert not any(type(m) is nn.Linear for m in model.modules())
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, wanted, atol=1e-5)
    assert peft.pack_linears(model) == 0


def test_only_float32_layers_are_packed():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4, device="meta"))
    assert peft.pack_linears(model) == 1
    assert [type(m) for m in model] == [PackedLinear, nn.Linear, nn.Linear]


def test_a_model_with_adapters_is_refused_and_stays_as_it_is():
    model = peft.get_peft_model(chat_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="pack the base model, then add them"):
        peft.pack_linears(model)
    assert not any(isinstance(m, PackedLinear) for m in model.modules())


def test_copies_pickles_and_what_it_cannot_become():
    linear = nn.Linear(30, 50)
    layer = peft.pack_linears(model := nn.Sequential(copy.deepcopy(linear))) and model[0]
    x = torch.randn(2, 3, 30)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.float()):
        assert torch.equal(twin(x), layer(x))
        assert torch.equal(twin.packed.to_dense(), linear.weight)
    with pytest.raises(TypeError, match="convert or move the model first"):
        layer.half()


@pytest.mark.parametrize("trained_on", ["plain", "packed"])
def test_the_base_is_compared_as_the_floats_that_it_is(trained_on, tmp_path):
    """With the narrow margin of floats: nothing here is rounded."""

    def model(scale, packed):
        base = chat_llama()
        with torch.no_grad():
            for weight in base.parameters():
                weight.mul_(scale)
        if packed:
            peft.pack_linears(base)
        return base

    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"])
    peft.get_peft_model(model(1.0, trained_on == "packed"), config).save_pretrained(tmp_path)
    for packed in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("error", PeftWarning)
            peft.PeftModel.from_pretrained(model(1.0, packed), tmp_path)
        with pytest.raises(BaseMismatchError, match="10%"):
            peft.PeftModel.from_pretrained(model(1.1, packed), tmp_path)


def test_an_adapter_goes_from_a_packed_base_to_a_plain_one(tmp_path):
    base = chat_llama().eval()
    packed = copy.deepcopy(base)
    peft.pack_linears(packed)
    model = peft.get_peft_model(packed, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base, tmp_path, strict=True).eval()
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        wanted = again(ids).logits
        assert torch.allclose(model(ids).logits, wanted, atol=1e-5)
        merged = model.merge_and_unload()
        assert torch.allclose(merged(ids).logits, wanted, atol=1e-5)
    assert any(isinstance(m, PackedLinear) for m in merged.modules())
