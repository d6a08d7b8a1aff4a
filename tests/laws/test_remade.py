"""Laws on layers that make W + dW anew in each pass: values, first and second gradients, and what they keep."""

from __future__ import annotations

import pytest
import torch
from laws_table import EXAMPLES, gap, wrapped
from models import noise
from test_training import run_backward
from torch.utils.checkpoint import checkpoint

from peft.core.adapter import Adapter
from peft.ops import lowrank, product, remade
from peft.registry import method


def remakes(example, dtype=torch.float32):
    """Whether the example's layers are linear and make W' anew: a method may do so for some settings only."""
    adapter_cls = method(example.method).tuner.layer_cls.adapter_cls if example.base != "parameters" else Adapter
    if adapter_cls.remakes is Adapter.remakes or example.base not in ("mlp", "sequence", "no_bias"):
        return False
    adapters = [layer.adapters["default"] for layer in wrapped(example, dtype).train().base_model.layers.values()]
    return all(a.low_rank() is None and a.remakes() is not None for a in adapters)


SUCH = [e for e in EXAMPLES if remakes(e)]
IN_HALF = [e for e in SUCH if remakes(e, torch.bfloat16)]
each = pytest.mark.parametrize("example", SUCH, ids=str)


@pytest.fixture(autouse=True)
def taken(monkeypatch):
    """The calls of the operation; a test that never came by it fails."""
    calls, apply = [], remade.Remade.apply
    for example in SUCH:  # however few rows there are
        monkeypatch.setattr(method(example.method).tuner.layer_cls.adapter_cls, "remakes_from", 0)
    monkeypatch.setattr(remade.Remade, "apply", lambda *a: calls.append(a) or apply(*a))
    yield calls
    assert calls


def plain(monkeypatch):
    """From here on, plain operations."""
    monkeypatch.setattr(product, "weight_of", lambda base, x, backend: None)


@each
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_gradients_are_right_to_second_order(example, mode, taken):
    """One layer, in float64; in training with a dropout mask that every call draws alike."""
    if example.projected:
        taken.append("nothing to see")
        pytest.skip("the method changes its gradients")
    layer = next(iter(wrapped(example, torch.float64).base_model.layers.values())).train(mode == "train")
    x = noise((4, layer.in_features), 3).double().requires_grad_()
    params = [p for p in layer.parameters() if p.requires_grad]

    def run(x, *params):
        torch.manual_seed(3)
        return layer(x)

    fast = {"fast_mode": True}  # the differences along one random direction: there are hundreds of numbers
    assert torch.autograd.gradcheck(run, [x, *params], **fast)
    assert torch.autograd.gradgradcheck(run, [x, *params], **fast)


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_gradients_are_those_of_plain_operations(example, dtype, monkeypatch):
    model, x = wrapped(example, dtype), example.inputs(dtype).requires_grad_()
    for layer in model.base_model.layers.values():
        if (bias := layer.bias) is not None:
            bias.requires_grad_()
    found = {**run_backward(model, x), "x": x.grad.clone()}
    x.grad = None
    plain(monkeypatch)
    wanted = {**run_backward(model, x), "x": x.grad.clone()}
    assert found.keys() == wanted.keys() and any(n.endswith("bias") for n in found) == (example.base != "no_bias")
    for n, g in found.items():
        assert gap(g, wanted[n]) <= (1e-12 if dtype is torch.float64 else 5e-6), n


@each
def test_many_rows_give_what_few_do(example, monkeypatch, taken):
    layer = next(iter(wrapped(example).base_model.layers.values()))
    x = noise((3, lowrank.FEW, layer.in_features), 3)
    with torch.no_grad():
        found = layer(x)
        assert not taken and gap(torch.stack([layer(row) for row in x]), found) < 2e-6
        with monkeypatch.context() as patch:
            plain(patch)
            assert gap(layer(x), found) < 2e-6
    assert gap(layer(x).detach(), found) < 2e-6


@pytest.mark.parametrize("example", IN_HALF, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_near_plain_operations(example, dtype, monkeypatch):
    model, x = wrapped(example, dtype), example.inputs(dtype).requires_grad_()
    quick = {**run_backward(model, x), "x": x.grad.clone(), "y": model(x).detach()}
    x.grad = None
    plain(monkeypatch)
    exact = {**run_backward(model, x), "x": x.grad.clone(), "y": model(x).detach()}
    for n, g in quick.items():
        assert g.dtype is exact[n].dtype and gap(g, exact[n]) < (0.05 if dtype is torch.bfloat16 else 0.01), n


@each
def test_nothing_of_the_weights_size_is_kept(example):
    model, x = wrapped(example).train(), example.inputs().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(x)
    own = {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}
    shapes = {tuple(layer.base_layer.weight.shape) for layer in model.base_model.layers.values()}
    assert kept and not [t.shape for t in kept if tuple(t.shape) in shapes and t.data_ptr() not in own]
    y.sum().backward()


@each
def test_what_needs_no_gradient_gets_none(example):
    layer = next(iter(wrapped(example).base_model.layers.values()))
    x = noise((4, layer.in_features), 3).requires_grad_()
    params = [p for p in layer.parameters() if p.requires_grad]
    for p in params:
        p.requires_grad_(False)
    layer(x).sum().backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in layer.parameters())
    for p in params:
        p.requires_grad_()
    layer(x.detach()).sum().backward()
    assert all(p.grad is not None for p in params) and layer.base_layer.weight.grad is None


@each
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(example, reentrant):
    model, x = wrapped(example).train(), example.inputs().requires_grad_()
    wanted = run_backward(model, x)
    torch.manual_seed(0)
    model.zero_grad(set_to_none=True)
    y = checkpoint(model, x, use_reentrant=reentrant)
    (y.float() * noise(y.shape, 3)).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    assert all(gap(found[n], wanted[n]) < 1e-6 for n in wanted)


@each
def test_parameters_changed_before_backward_are_an_error(example):
    layer = next(iter(wrapped(example).base_model.layers.values()))
    x = noise((4, layer.in_features), 3).requires_grad_()
    y = layer(x)
    with torch.no_grad():
        next(p for p in layer.parameters() if p.requires_grad).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = layer(x)
    *_, owner, key, _ = next(layer.adapters["default"].places())
    owner[key] = torch.nn.Parameter(owner[key].detach().clone())
    with pytest.raises(RuntimeError, match="were replaced"):
        y.sum().backward()
