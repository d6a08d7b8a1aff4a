"""Laws on quantized bases: an adapter does what it does on a float base with the weight that the stored one stands for.

What it does there is held against formulas by the other laws.
"""

from __future__ import annotations

import copy

import pytest
import torch
from laws_table import EXAMPLES, base_tensors, bound, gap, quiet, same_tensors, train_a_little, with_second, wrapped
from storages import STORAGES, quantized
from torch import nn

import peft
from peft import quant
from peft.core.layer import AdapterLayer
from peft.errors import MergeError

LINEAR = [e for e in EXAMPLES if e.base in ("mlp", "sequence", "no_bias") and e.name != "saved_head"]
FIRST = {e.name.partition("_")[0]: e.name for e in reversed(LINEAR)}.values()  # of each method and variant
laws = pytest.mark.parametrize(
    ("example", "storage"),
    [s.params(e, e.name in FIRST) for s in STORAGES for e in LINEAR if s.every or e.name in FIRST],
)


def base_of(example, storage):
    return quantized(example.make_base(), storage).eval()


@quiet
def twin_of(example, model):
    """The same adapter on a float base with the weights that those of the quantized one stand for."""
    base = example.make_base()
    for path, linear in base.named_modules():
        if type(linear) is nn.Linear:
            stored = model.base_model.model.get_submodule(path)
            stored = stored.get_base_layer() if isinstance(stored, AdapterLayer) else stored
            linear.weight = nn.Parameter(floats(stored).clone())
    twin = wrapped(example, base=base)
    peft.set_peft_model_state_dict(twin, peft.get_peft_model_state_dict(model))
    return twin


def floats(stored):
    """The weight of a layer that stores it in few bits."""
    backend = quant.find(stored)
    assert backend.name
    return backend.unpack(stored, backend.get(stored, "weight"))


def random_in_training(example):
    return bool(
        example.dropout
        or example.random
        or example.config.get("lora_dropout")
        or example.config.get("monteclora_config")
    )


@laws
def test_computes_and_learns_as_on_floats(example, storage):
    model, x = wrapped(example, base=base_of(example, storage)), example.inputs()
    twin = twin_of(example, model)
    with torch.no_grad():
        assert gap(model(x), twin(x)) <= storage.kernel
        with model.disable_adapter():
            assert torch.equal(model(x), base_of(example, storage)(x))
    if random_in_training(example):
        return
    found = [_gradients(m.train(), x, example) for m in (model, twin)]
    assert found[0].keys() == found[1].keys()
    for name, wanted in found[1].items():
        assert gap(found[0][name], wanted) <= max(storage.tolerance * 10, example.tolerance * 10), name


def _gradients(model, x, example):
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return {"y": y.detach(), "x": x.grad} | {
        n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None
    }


@laws
@torch.no_grad()
def test_merges_into_the_stored_weight_and_back(example, storage):
    model, x = wrapped(example, base=base_of(example, storage)), example.inputs()
    before, output = base_tensors(model), model(x)
    fresh = {n: p.clone() for n, p in base_of(example, storage).named_parameters()}
    assert same_tensors({n: before[n] for n in fresh}, fresh)
    if not example.merges or storage.stores is None:
        with pytest.raises((NotImplementedError, MergeError)):
            model.merge_adapter()
        assert same_tensors(base_tensors(model), before)
        assert torch.equal(model(x), output)
        return
    merged = example.make_base()  # becomes the quantized form of the merged float model
    for path, layer in model.base_model.layers.items():
        merged.get_submodule(path).weight.copy_(layer.adapted_weight([layer.adapters["default"]], layer.base_weight()))
    merged = quantized(merged, storage)
    model.merge_adapter()
    for path, layer in model.base_model.layers.items():
        assert gap(floats(layer.get_base_layer()), floats(merged.get_submodule(path))) <= storage.stores
    assert model(x).isfinite().all()
    model.unmerge_adapter()
    assert same_tensors(base_tensors(model), before)
    assert torch.equal(model(x), output)


@laws
@quiet
@torch.no_grad()
def test_saved_loaded_and_copied(example, storage, tmp_path):
    model, x = wrapped(example, base=base_of(example, storage)), example.inputs()
    output = model(x)
    if storage.copies:
        assert torch.equal(copy.deepcopy(model)(x), output)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base_of(example, storage), tmp_path)
    assert gap(bound(loaded.eval(), example)(x), output) <= 1e-6
    base = model.unload()
    assert torch.equal(base(x), base_of(example, storage)(x))
    assert same_tensors(dict(base.state_dict()), dict(base_of(example, storage).state_dict()))


@laws
@torch.no_grad()
def test_mixed_batches(example, storage):
    if not example.rows:
        pytest.skip("refused on every base")
    model, x = with_second(example, base=base_of(example, storage)), example.inputs()
    names = (["second", "__base__", "default"] * 3)[: len(x)]
    mixed = model(x, adapter_names=names)
    for i, name in enumerate(names):
        wanted = model(x, adapter_names=[name] * len(x))
        assert gap(mixed[i], wanted[i]) <= 2e-6 + storage.jumps, (i, name)


@laws
@quiet
def test_trains_declared_tensors_only(example, storage):
    torch.manual_seed(0)
    model = peft.get_peft_model(base_of(example, storage), example.make_config()).train()
    train_a_little(model)
    bound(model, example)
    before = base_tensors(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    optimizer = torch.optim.SGD(trained, lr=0.1)
    model(example.inputs()).square().sum().backward()
    optimizer.step()
    assert same_tensors(base_tensors(model), before)
    assert all(p.dtype is torch.float32 for p in trained)
