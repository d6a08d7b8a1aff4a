"""Backends for quantized layers, on their libraries where those are installed and on stand-ins for the others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import stand_ins
import torch
from models import noise
from torch import nn

import peft
from peft import HRAConfig, IA3Config, LoraConfig, get_peft_model, quant
from peft.core.match import all_linear
from peft.errors import ConfigError, MergeError

IN, OUT = 64, 32


@dataclass(frozen=True)
class Row:
    """One way to store a layer."""

    name: str
    backend: str
    make: Callable
    kernel: float = 2e-6  # outputs against those of the float weight
    dtype: torch.dtype = torch.float32
    packs: bool = False  # a merged weight can be stored

    def __str__(self) -> str:
        return self.name


HALF = {"kernel": 3e-3, "dtype": torch.float16}
MODEL = stand_ins.of_gptqmodel
ROWS = [
    *(Row(f"gptq_{bits}", "gptq", stand_ins.gptq(bits)) for bits in (2, 3, 4, 8)),
    Row("gptq_act_order", "gptq", stand_ins.gptq(4, ordered=False)),
    Row("gptq_marlin", "gptq", MODEL("GPTQQuantLinear", "MarlinLinear", "marlin")),
    Row("gptqmodel_other", "gptqmodel", MODEL("BaseQuantLinear", "QQQLinear", "qqq")),
    Row("awq", "awq", stand_ins.awq),
    Row("awq_marlin", "awq", MODEL("AWQuantLinear", "AwqMarlinLinear", "marlin_awq")),
    Row("aqlm", "aqlm", stand_ins.aqlm),
    Row("eetq", "eetq", stand_ins.eetq),
    Row("inc", "inc", stand_ins.inc),
    Row("inc_float8", "inc", stand_ins.inc_float8, kernel=5e-3),
    Row("te", "te", stand_ins.te(False), packs=True),
    Row("te_quantized", "te", stand_ins.te(True)),
    Row("real_gptq", "gptq", stand_ins.real_gptq, **HALF),
    Row("real_awq", "awq", stand_ins.real_awq, **HALF),
    Row("real_autoawq", "awq", stand_ins.real_autoawq, **HALF),
    Row("real_aqlm", "aqlm", stand_ins.real_aqlm),
    Row("real_inc", "inc", stand_ins.real_inc, kernel=1e-3),
    Row("gguf_q8", "gguf", stand_ins.gguf("Q8_0"), packs=True),
    Row("gguf_q4_permuted", "gguf", stand_ins.gguf("Q4_0", permuted=True), packs=True),
    Row("torchao_nf4", "torchao", stand_ins.nf4, packs=True),
    Row("torchao_int4", "torchao", stand_ins.int4, packs=True),
    Row("torchao_activations_too", "torchao", stand_ins.activations_too, kernel=0.02, packs=True),
    Row("hqq_4", "hqq", stand_ins.hqq4, packs=True),
]
METHODS = {
    "lora": LoraConfig(r=4, target_modules=["front", "layer"]),
    "dora": LoraConfig(r=4, target_modules=["front", "layer"], use_dora=True),
    "hra": HRAConfig(r=4, target_modules=["front", "layer"]),
    "ia3": IA3Config(target_modules=["front", "layer"], feedforward_modules=[]),
}
rows = pytest.mark.parametrize("row", ROWS, ids=str)
methods = pytest.mark.parametrize("method", METHODS)


class Net(nn.Module):
    """A float layer in front of a quantized one."""

    def __init__(self, row: Row | None, monkeypatch=None) -> None:
        super().__init__()
        self.front, layer = filled(nn.Linear(12, IN), 1), filled(nn.Linear(IN, OUT), 3)
        dtype = torch.float32 if row is None else row.dtype
        self.layer = layer if row is None else row.make(layer, monkeypatch)
        self.front.to(dtype)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.tanh(self.front(x)))


def filled(linear: nn.Linear, seed: int) -> nn.Linear:
    with torch.no_grad():
        linear.weight.copy_(noise(linear.weight.shape, seed) / 2)
        linear.bias.copy_(noise(linear.bias.shape, seed + 1) / 2)
    return linear


def trained(base: nn.Module, config):
    """The base with an adapter away from its start."""
    torch.manual_seed(0)
    model = get_peft_model(base, copy.deepcopy(config)).eval()
    with torch.no_grad():
        for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p.add_(noise(p.shape, 50 + i).to(p.dtype) * 0.1)
    return model


def twin_of(model, row, config):
    """The same adapter on a float model with the weights that the stored ones stand for."""
    stored = model.base_model.model.layer.get_base_layer()
    base = Net(None).to(row.dtype)
    with torch.no_grad():
        base.layer.weight.copy_(model.base_model.model.layer.base_weight())
        base.layer.bias.copy_(stored.bias)
    twin = trained(base, config)
    peft.set_peft_model_state_dict(twin, peft.get_peft_model_state_dict(model))
    return twin


def gap(a, b):
    return float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-6))


@rows
@torch.no_grad()
def test_found_by_type_and_read(row, monkeypatch):
    net = Net(row, monkeypatch)
    backend = quant.find(net.layer)
    assert backend.name == row.backend
    W = backend.unpack(net.layer, backend.get(net.layer, "weight"))
    assert W.shape == (OUT, IN) and W.is_floating_point() and W.abs().max() > 0.1
    x = noise((5, IN), 9).to(row.dtype)
    assert gap(net.layer(x), nn.functional.linear(x.to(W.dtype), W, net.layer.bias.to(W.dtype))) <= row.kernel
    assert all_linear(net) == {"front", "layer"}


@rows
@methods
def test_computes_and_learns_as_on_floats(row, method, monkeypatch):
    config = METHODS[method]
    model = trained(Net(row, monkeypatch), config)
    twin = twin_of(model, row, config)
    found = []
    for m in (model, twin):
        x = noise((5, 12), 9).to(row.dtype).requires_grad_()
        y = m(x)
        y.float().square().sum().backward()
        found.append({"y": y, "x": x.grad} | {n: p.grad for n, p in m.named_parameters() if p.requires_grad})
    assert len(found[0]) > 3
    for name, wanted in found[1].items():
        assert found[0][name].dtype == wanted.dtype
        assert gap(found[0][name], wanted) <= max(5 * row.kernel, 2e-5), name


@rows
@methods
@torch.no_grad()
def test_merging(row, method, monkeypatch):
    model, x = trained(Net(row, monkeypatch), METHODS[method]), noise((5, 12), 9).to(row.dtype)
    y = model(x)
    with model.disable_adapter():
        plain = model(x)
    assert gap(y, plain) > 1e-2
    if row.packs:
        model.merge_adapter()
        assert gap(model(x), y) < gap(plain, y)
        model.unmerge_adapter()
    else:
        with pytest.raises(MergeError, match='target="dequantized"'):
            model.merge_adapter()
    assert torch.equal(model(x), y)
    assert torch.equal(copy_of_base(model)(x), plain)
    merged = model.merge_and_unload(target="dequantized")
    assert type(merged.layer) is nn.Linear
    assert gap(merged(x), y) <= max(10 * row.kernel, 2e-5)


def copy_of_base(model):
    """A module that calls the base layers of a model without hooks of the wrappers."""
    net = Net.__new__(Net)
    nn.Module.__init__(net)
    net.front, net.layer = model.base_model.model.front.base_layer, model.base_model.model.layer.base_layer
    return net


@rows
@torch.no_grad()
def test_unloading_leaves_the_layer_as_it_was(row, monkeypatch):
    net = Net(row, monkeypatch)
    x, hooks = noise((5, 12), 9).to(row.dtype), len(net.layer._forward_hooks)
    y = net(x)
    layer = net.layer
    base = trained(net, METHODS["lora"]).unload()
    assert base.layer is layer and len(layer._forward_hooks) == hooks
    assert torch.equal(base(x), y)


CLASSES = {
    "gptq_4": ("gptq", "GPTQLoraLinear"),
    "awq": ("awq", "AwqLoraLinear"),
    "aqlm": ("aqlm", "AqlmLoraLinear"),
    "eetq": ("eetq", "EetqLoraLinear"),
    "inc": ("inc", "IncLoraLinear"),
    "te": ("te", "TeLinear"),
    "torchao_nf4": ("torchao", "TorchaoLoraLinear"),
    "hqq_4": ("hqq", "HqqLoraLinear"),
}


@pytest.mark.parametrize("name", CLASSES)
def test_classes_of_hugging_face_peft(name, monkeypatch):
    import importlib

    from peft.tuners.lora import Linear

    row = next(r for r in ROWS if r.name == name)
    layer = trained(Net(row, monkeypatch), METHODS["lora"]).base_model.model.layer
    found = []
    for module, cls in CLASSES.values():
        if isinstance(layer, getattr(importlib.import_module(f"peft.tuners.lora.{module}"), cls)):
            found.append(cls)
    assert found == [CLASSES[name][1]]
    assert not isinstance(layer, Linear)


def test_qalora_changes_zero_points_only(monkeypatch):
    group, row = 8, ROWS[2]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["layer"], use_qalora=True, qalora_group_size=group)
    model = trained(Net(row, monkeypatch), config)
    layer, x = model.base_model.model.layer, noise((5, IN), 9)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert A.shape == (4, IN // group)
    means = x.view(5, -1, group).mean(-1) * (IN / group)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer.base_layer(x) + 1.5 * means @ A.T @ B.T)
        delta = layer.get_delta_weight("default").view(OUT, -1, group)
    assert (delta - delta[..., :1]).abs().max() == 0 and delta.abs().max() > 0
    layer(x).sum().backward()
    assert A.grad.abs().max() > 0
    with pytest.raises(ConfigError, match="GPTQ"):
        get_peft_model(Net(None), config)


def test_blocks_that_only_llama_cpp_makes(monkeypatch):
    net = Net(next(r for r in ROWS if r.name == "gguf_q8"), monkeypatch)
    from gguf import GGMLQuantizationType

    net.layer.ggml_type = int(GGMLQuantizationType.Q4_K)
    with pytest.raises(MergeError, match="Q4_K"):
        quant.find(net.layer).pack(net.layer, torch.zeros(OUT, 256), net.layer.weight)


def test_unknown_tensors_of_torchao(monkeypatch):
    net = Net(next(r for r in ROWS if r.name == "torchao_activations_too"), monkeypatch)
    backend = quant.find(net.layer)
    with monkeypatch.context() as patch:
        patch.setattr("peft.quant.torchao.REPACKED", {})
        with pytest.raises(MergeError, match="Int8Tensor"):
            backend.pack(net.layer, torch.zeros(OUT, IN), net.layer.weight)


@pytest.mark.parametrize("name", ["gptq_4", "torchao_int4", "torchao_activations_too"])
def test_trained_biases(name, monkeypatch):
    """The kernel's own graph, which is put aside, had their gradient."""
    config = LoraConfig(r=4, target_modules=["layer"], bias="all")
    net = Net(next(r for r in ROWS if r.name == name), monkeypatch)
    if "bias" in net.layer._buffers:
        net.layer.bias = nn.Parameter(net.layer._buffers.pop("bias"))
    model = trained(net, config)
    model(noise((5, 12), 9)).square().sum().backward()
    wanted = (2 * model(noise((5, 12), 9))).sum(0)
    torch.testing.assert_close(model.base_model.model.layer.base_layer.bias.grad, wanted)
