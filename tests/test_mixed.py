"""PeftMixedModel: adapters of several methods on one model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import peft
from peft import LoraConfig, TrainableTokensConfig, get_peft_model


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.a, self.b = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.b(self.a(self.words(x)))


@pytest.fixture
def mixed():
    torch.manual_seed(0)
    model = get_peft_model(Small(), LoraConfig(target_modules=["words", "a"], init_lora_weights=False), mixed=True)
    model.add_adapter(
        "tokens", TrainableTokensConfig(token_indices=[1, 2], target_modules=["words"], init_weights=False)
    )
    model.add_adapter("second", LoraConfig(target_modules=["b"], init_lora_weights=False))
    return model


X = torch.tensor([[1, 2, 3], [4, 1, 6]])


def trained(model):
    return {n.partition("base_model.model.")[2] for n, p in model.named_parameters() if p.requires_grad}


def test_mixed_model(mixed):
    assert type(mixed) is peft.PeftMixedModel and not isinstance(mixed, peft.PeftModel)
    assert mixed.active_adapters == ["default"] and set(mixed.peft_config) == {"default", "tokens", "second"}
    assert "base_model.model.words.base_layer.lora_embedding_A.default" in mixed.state_dict()
    assert "base_model.model.words.trainable_tokens_delta.tokens" in mixed.state_dict()
    one = mixed(X)
    mixed.set_adapter(["default", "tokens", "second"])
    everything = mixed(X)
    assert (everything - one).abs().max() > 0.01
    assert {n.rpartition(".")[2] for n in trained(mixed)} == {"default", "tokens", "weight"}
    mixed(X).sum().backward()
    assert {n for n, p in mixed.named_parameters() if p.grad is not None} == {
        n for n, p in mixed.named_parameters() if p.requires_grad
    }
    torch.testing.assert_close(copy.deepcopy(mixed)(X), everything)
    torch.testing.assert_close(pickle.loads(pickle.dumps(mixed))(X), everything)


def test_mixed_model_merges_innermost_first(mixed):
    with mixed.disable_adapter():
        base = mixed(X)
    mixed.set_adapter(["default", "tokens", "second"])
    want = mixed(X)
    mixed.base_model.merge_adapter()
    torch.testing.assert_close(mixed(X), want, atol=1e-5, rtol=1e-5)
    mixed.base_model.unmerge_adapter()
    assert torch.equal(mixed(X), want)
    torch.testing.assert_close(copy.deepcopy(mixed).unload()(X), base)
    plain = mixed.merge_and_unload()
    torch.testing.assert_close(plain(X), want, atol=1e-5, rtol=1e-5)
    assert type(plain.words) is nn.Embedding and type(plain.b) is nn.Linear and not hasattr(plain, "peft_config")


def test_mixed_model_delete_and_load(mixed, tmp_path):
    mixed.delete_adapter(["default", "second"])
    assert list(mixed.peft_config) == ["tokens"] == mixed.active_adapters
    assert type(mixed.get_base_model().words.base_layer) is nn.Embedding and type(mixed.get_base_model().a) is nn.Linear
    single = get_peft_model(
        copy.deepcopy(mixed).unload(), LoraConfig(target_modules=["b"], init_lora_weights=False)
    ).eval()
    single.save_pretrained(tmp_path)
    mixed.load_adapter(str(tmp_path), "loaded")
    mixed.set_adapter("loaded")
    torch.testing.assert_close(mixed(X), single(X))
    alone = peft.PeftMixedModel.from_pretrained(copy.deepcopy(mixed).unload(), str(tmp_path))
    torch.testing.assert_close(alone(X), single(X))


def test_mixed_model_misuse(mixed, tmp_path):
    keys = list(mixed.state_dict())
    for names in ("nope", ["default", "nope"]):
        with pytest.raises(ValueError, match="nope"):
            mixed.set_adapter(names)
        with pytest.raises(ValueError, match="nope"):
            mixed.delete_adapter(names)
    with pytest.raises(ValueError, match="already exists"):
        mixed.add_adapter("default", LoraConfig(target_modules=["a"]))
    with pytest.raises(ValueError):
        mixed.add_adapter("bad", LoraConfig(target_modules=["nothing"]))
    with pytest.raises(ValueError, match="not compatible"):
        get_peft_model(Small(), peft.PrefixTuningConfig(num_virtual_tokens=2), mixed=True)
    assert list(mixed.state_dict()) == keys and "bad" not in mixed.peft_config
    for call in (mixed.get_layer_status, mixed.get_model_status, lambda: peft.get_model_status(mixed)):
        with pytest.raises(TypeError):
            call()
    for call in (lambda: mixed.save_pretrained(tmp_path), lambda: mixed.create_or_update_model_card(tmp_path)):
        with pytest.raises(NotImplementedError):
            call()


def test_mixed_model_modules_to_save():
    model = get_peft_model(Small(), LoraConfig(target_modules=["a"], modules_to_save=["b"]), mixed=True)
    assert model.modules_to_save == {"b"} and "b.modules_to_save.default.weight" in trained(model)
    model.set_modules_to_save(LoraConfig(modules_to_save=["words"]), "default")
    assert set(model.base_model.extras) == {"b", "words"}
