"""float32 products by oneDNN: the same values and gradients, in training only, and gone with the adapters.

On a processor where torch is as fast these tests ask for oneDNN all the same, and for layers of any size.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import chat_llama
from torch import nn

import peft
from peft.ops import matmul, onednn
from peft.ops.product import OneDnnLinear

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
CONFIGS = {
    "lora": lambda: peft.LoraConfig(target_modules="all-linear", lora_dropout=0.1),
    "dora": lambda: peft.LoraConfig(target_modules=["q_proj", "down_proj"], use_dora=True),
    "miss": lambda: peft.MissConfig(target_modules=["q_proj", "down_proj"], r=4),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "bottleneck": lambda: peft.BottleneckConfig(),
}


@pytest.fixture
def everywhere(monkeypatch):
    """oneDNN for products of any size; yields the shapes of what it multiplied."""
    shapes, multiply = [], matmul.multiplied

    def counted(x, W, bias):
        shapes.append((*x.shape[:-1], *W.shape))
        return multiply(x, W, bias)

    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(matmul, "LEAST", 1)
    monkeypatch.setattr(onednn, "LARGE", 1)
    monkeypatch.setattr(matmul, "multiplied", counted)
    return shapes


def gradients(model, ids):
    torch.manual_seed(0)
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradients_are_those_of_torch(config, everywhere, monkeypatch):
    torch.manual_seed(1)
    model = peft.get_peft_model(chat_llama(), config()).train()
    ids = torch.arange(12).view(2, 6)
    found = gradients(model, ids)
    assert len(everywhere) > 8  # forward and backward of several layers
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: False)
    everywhere.clear()
    wanted = gradients(model, ids)
    assert not everywhere and found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_without_a_gradient_the_base_model_is_the_same_bit_for_bit(everywhere):
    base = chat_llama().eval()
    ids = torch.arange(12).view(2, 6)
    wanted = base(ids).logits
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear")).eval()
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, wanted)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, wanted)
    assert not everywhere


def test_the_layers_go_with_the_adapters(everywhere):
    base = chat_llama()
    classes, text = [type(m) for m in base.modules()], repr(base)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"]))
    assert type(base.lm_head) is OneDnnLinear and isinstance(base.lm_head, nn.Linear)
    assert repr(base.lm_head).startswith("Linear(")
    base = model.unload()
    assert [type(m) for m in base.modules()] == classes and repr(base) == text


def test_the_layers_go_from_a_model_that_was_cast_too_and_half_precision_never_has_them(everywhere):
    model = peft.get_peft_model(chat_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    assert any(type(m) is OneDnnLinear for m in model.modules())
    assert not any(type(m) is OneDnnLinear for m in model.bfloat16().unload().modules())
    half = peft.get_peft_model(chat_llama().bfloat16(), peft.LoraConfig(target_modules=["q_proj"]))
    assert not any(type(m) is OneDnnLinear for m in half.modules()) and not everywhere


def test_a_weight_written_to_before_the_backward_is_an_error(everywhere):
    layer = nn.Linear(6, 4).requires_grad_(False)
    peft.use_onednn(layer)
    y = layer(torch.randn(3, 6, requires_grad=True))
    layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_use_onednn_multiplies_without_a_gradient_and_stays(everywhere):
    model = chat_llama().eval().requires_grad_(False)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        wanted = model(ids).logits
        linears = sum(type(m) is nn.Linear for m in model.modules())
        assert peft.use_onednn(model) == linears > 0 == len(everywhere)
        torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-6)
        assert len(everywhere) == linears
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
        everywhere.clear()
        torch.testing.assert_close(adapted(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-6)
        assert len(everywhere) == linears
    assert type(adapted.unload().lm_head) is OneDnnLinear


def test_copies_and_pickles(everywhere):
    layer = nn.Sequential(nn.Linear(6, 4).requires_grad_(False))
    peft.use_onednn(layer)
    x = torch.randn(3, 6, requires_grad=True)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x)) and type(twin[0]) is OneDnnLinear
    assert layer.state_dict().keys() == {"0.weight", "0.bias"}


def test_where_a_product_is_not_all_that_happens_torch_multiplies(everywhere):
    layer = nn.Linear(6, 4)
    peft.use_onednn(layer)
    x = torch.randn(3, 6, requires_grad=True)
    layer(x).sum().backward()  # a trained weight
    assert layer.weight.grad is not None and not everywhere
    layer.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
    torch.func.vmap(layer)(x)
    layer.double()(x.double())
    torch.compile(layer.float(), backend="eager", fullgraph=True)(x)
    with torch.no_grad():
        layer.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert not everywhere


def test_second_derivatives(everywhere):
    layer = nn.Linear(6, 4, bias=False).requires_grad_(False)
    peft.use_onednn(layer)
    x = torch.randn(3, 6, requires_grad=True)
    (g,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    (twice,) = torch.autograd.grad(g.sum(), x)
    W = layer.weight
    torch.testing.assert_close(twice, (2 * W.T @ W).sum(0).expand(3, 6))


def test_a_layer_whose_weight_lies_elsewhere_is_left_alone(everywhere):
    layer = nn.Linear(6, 4)
    del layer.weight
    layer.weight = torch.randn(4, 6)  # as norms of weights and offloading leave it
    model = nn.Sequential(layer, nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)))
    assert peft.use_onednn(model) == 0
    model(torch.randn(2, 6)).sum().backward()


def test_the_processor_decides_and_may_be_overruled(monkeypatch):
    for told, wanted in (("0", False), ("1", True)):
        monkeypatch.setenv("PEFT_ONEDNN", told)
        matmul.onednn_is_faster.cache_clear()
        assert matmul.onednn_is_faster() is wanted
    matmul.onednn_is_faster.cache_clear()
    monkeypatch.delenv("PEFT_ONEDNN")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not matmul.onednn_is_faster()
    matmul.onednn_is_faster.cache_clear()
