"""Laws under torch.compile: one graph for every kind of layer, equal outputs, switching included."""

from __future__ import annotations

import pytest
import torch
from laws_table import BY_NAME, EXAMPLES, SOME, gap, with_second, wrapped

SEEN = {  # one of each code path; the others differ in values only
    "linear", "linear_3d_input", "dora", "lora_bias", "dropout", "pissa", "pissa_dora", "transposed", "conv1", "conv2",
    "conv_grouped", "conv_reflect", "conv_dora", "embedding", "embedding_dora", "attention", "parameter_2d",
    "parameters_3d", "saved_head", "tokens", "tokens_beside", "alora", "bdlora", "kasa", "monteclora", "velora",
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model):
    return torch.compile(model, fullgraph=True, backend="eager")


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.name in SEEN or e.method != "LORA"], ids=str)
def test_compiles_into_one_graph(example):
    model, x = wrapped(example), example.inputs()
    if example.compiles:
        pytest.xfail(example.compiles)
    with torch.no_grad():
        wanted = model(x)
        assert gap(compiled(model)(x), wanted) < 2e-6
    if example.random or example.dropout or example.config.get("lora_dropout") or "monteclora_config" in example.config:
        return  # random
    model.train()
    model.zero_grad()
    model(x).sum().backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    compiled(model)(x).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == plain.keys()
    assert all(gap(found[n], plain[n]) < max(5e-6, 3 * example.tolerance) for n in plain)


@pytest.mark.parametrize("example", SOME, ids=str)
@torch.no_grad()
def test_compiled_models_follow_switching(example):
    if example.compiles:
        pytest.xfail(example.compiles)
    model, x = with_second(example), example.inputs()
    fast = compiled(model)
    first = model(x)
    assert gap(fast(x), first) < 2e-6
    model.set_adapter("second")
    second = model(x)
    assert gap(second, first) > 1e-2 and gap(fast(x), second) < 2e-6
    with model.disable_adapter():
        assert gap(fast(x), example.make_base()(x)) < 2e-6
    model.set_adapter("default")
    assert gap(fast(x), first) < 2e-6
    model.merge_adapter()
    assert gap(fast(x), first) < 3e-6
    model.unmerge_adapter()
    assert gap(fast(x), first) < 2e-6


@torch.no_grad()
def test_compiled_models_follow_changed_weights():
    for name in ("linear", "dora"):
        model, x = wrapped(BY_NAME[name]), BY_NAME[name].inputs()
        fast = compiled(model)
        fast(x)
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
        assert gap(fast(x), model(x)) < 2e-6
