"""bitsandbytes: what the laws on quantized bases cannot see on their small widths."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import needs, python
from storages import bnb_8bit
from torch import nn

import peft
from peft import quant

pytestmark = pytest.mark.skipif(bool(needs("bitsandbytes")), reason="needs bitsandbytes")
X = torch.linspace(-1, 1, 5 * 64).view(5, 64).sin()
kinds = pytest.mark.parametrize("double", [False, True], ids=["single", "double"])


def four_bit(inp, out, double=False, dtype=torch.float32, compute=None):
    """An NF4 layer of widths that the library's kernels take."""
    import bitsandbytes

    linear = nn.Linear(inp, out, dtype=dtype)
    made = bitsandbytes.nn.Linear4bit(
        inp, out, compute_dtype=compute or dtype, compress_statistics=double, quant_type="nf4"
    )
    made.load_state_dict(linear.state_dict())
    return made.to("cpu")


def four_bit_of(linear):
    import bitsandbytes

    made = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None, torch.float32, quant_type="nf4"
    )
    made.load_state_dict(linear.state_dict())
    return made.to("cpu")


def model_of(*layers, targets=("0",), **config):
    torch.manual_seed(1)
    config = {"r": 4, "target_modules": list(targets), "init_lora_weights": False, **config}
    return peft.get_peft_model(nn.Sequential(*layers), peft.LoraConfig(**config))


def floats(base):
    return quant.find(base).unpack(base, base.weight)


def needs_rewriting():
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("this CPU has no kernel for which the library rewrites weights")


def test_nobody_imports_it_to_find_out():
    python(
        "-c",
        "import sys, torch, peft\n"
        "model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), "
        "peft.LoraConfig(target_modules=['0']))\n"
        "model(torch.ones(1, 4)).sum().backward(); model.merge_and_unload()\n"
        "assert not [m for m in sys.modules if m.startswith('bitsandbytes')]",
    )


def test_layers_are_known_by_type():
    model = model_of(four_bit(64, 64), bnb_8bit(nn.Linear(64, 64)), nn.Linear(64, 64), targets="012")
    found = [s.quantization_backend for s in peft.get_layer_status(model)]
    assert found == ["bnb 4bit", "bnb 8bit", None]


@kinds
def test_the_rewriting_for_inference_is_undone(double):
    """Left alone, the library rounds the scales for good, and its kernel has no gradient."""
    needs_rewriting()
    torch.manual_seed(0)
    layers = [four_bit(64, 64, double), four_bit(64, 32, double)]
    W, before = [floats(m) for m in layers], [{k: v.clone() for k, v in m.state_dict().items()} for m in layers]
    model = model_of(*layers)  # the second layer has no adapter

    def gradients():
        model.zero_grad()
        y = model.train()(X)
        y.square().sum().backward()
        return [y, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

    wanted = gradients()
    with torch.no_grad():
        model.eval()(X)
        with model.disable_adapter():
            model(X)
    assert all(m.weight.quant_state.packing_format_for_cpu for m in layers)
    assert all(torch.equal(floats(m), w) for m, w in zip(layers, W))
    assert all(torch.equal(a, b) for a, b in zip(gradients(), wanted))
    with torch.no_grad():
        model.eval()(X)
    for m, tensors in zip(layers, before):
        found = m.state_dict()
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[k], v) for k, v in tensors.items())


@kinds
@torch.no_grad()
def test_merging_after_inference(double):
    needs_rewriting()
    base = four_bit(64, 32, double)
    codes, scales = base.weight.data.clone(), base.weight.quant_state.absmax.clone()
    model = model_of(base).eval()
    y = model(X)
    model.merge_adapter()
    merged = model(X)
    assert (merged - y).norm() < 0.25 * y.norm()  # the rounding to 4 bits, twice
    model.unmerge_adapter()
    assert torch.equal(model(X), y)
    left = model.unload()[0]
    assert left is base
    assert torch.equal(base.weight.data, codes) and torch.equal(base.weight.quant_state.absmax, scales)
    assert not base._forward_pre_hooks and not base._state_dict_pre_hooks


@kinds
@torch.no_grad()
def test_a_base_that_was_used_before(double):
    """Its scales are rounded already; what it is now is the base."""
    needs_rewriting()
    base = four_bit(64, 32, double).eval()
    exact = floats(base)
    y = base(X)
    W = floats(base)
    assert 0 < (W - exact).abs().max() < 0.01 * exact.abs().max()
    model = model_of(base, init_lora_weights=True)
    assert torch.equal(model.eval()(X), y)
    torch.testing.assert_close(model.train()(X), nn.functional.linear(X, W, base.bias))


@torch.no_grad()
def test_copies_and_saved_models_keep_what_was_kept(tmp_path):
    needs_rewriting()
    model = model_of(four_bit(64, 32)).eval()
    W = floats(model.base_model.layers["0"].get_base_layer())
    y = model(X)  # rewrites the weight
    torch.save(model, tmp_path / "model.pt")
    for copied in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        base = copied.base_model.layers["0"].get_base_layer()
        assert torch.equal(copied(X), y)
        assert torch.equal(floats(base), W)
        copied.train()(X)
        assert not getattr(base.weight.quant_state, "packing_format_for_cpu", False)
        assert torch.equal(floats(base), W)


def test_a_soft_prompt_learns_after_an_evaluation():
    """Its gradient flows through frozen layers only."""
    import models

    found = []
    for evaluate in (False, True):
        model = models.llama(hidden_size=64, intermediate_size=128, head_dim=16)
        for block in model.model.layers:
            block.mlp.up_proj = four_bit_of(block.mlp.up_proj)
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        torch.manual_seed(0)
        model = peft.get_peft_model(model, config)
        ids = torch.arange(8).view(2, 4)
        if evaluate:
            with torch.no_grad():
                model.eval()(input_ids=ids)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        found.append(next(p.grad for p in model.parameters() if p.grad is not None))
    torch.testing.assert_close(found[1], found[0])


def test_widths_that_the_kernel_does_not_take():
    base = four_bit(64, 20)
    model = model_of(base, init_lora_weights=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(X), nn.functional.linear(X, floats(base), base.bias))


@pytest.mark.parametrize("make", [lambda: four_bit(64, 96), lambda: bnb_8bit(nn.Linear(64, 96))], ids=["nf4", "int8"])
@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"lora_dropout": 0.1}], ids=["lora", "dora", "dropout"])
def test_no_float_copy_of_the_weight_is_kept(make, config):
    model, x, kept = model_of(make(), **config).train(), X.clone().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(x)
    assert kept and not any(t.is_floating_point() and t.numel() >= 64 * 96 for t in kept)
    y.sum().backward()


@pytest.mark.parametrize("method", ["LoHaConfig", "OFTConfig", "VeraConfig", "IA3Config", "LoKrConfig"])
def test_other_methods_keep_none_either(method):
    config = {"target_modules": ["0"], **({"feedforward_modules": []} if method == "IA3Config" else {})}
    config |= {"oft_block_size": 16} if method == "OFTConfig" else {"r": 4} if method not in ("IA3Config",) else {}
    model = peft.get_peft_model(nn.Sequential(four_bit(64, 96)), getattr(peft, method)(**config)).train()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(X.clone().requires_grad_())
    of_weight = [t for t in kept if t.is_floating_point() and t.shape in ((64, 96), (96, 64))]
    assert not of_weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_dtypes(dtype, compute):
    """Adapters are float32 unless asked otherwise; outputs have the input's dtype whatever the layer computes in."""
    base = four_bit(64, 32, dtype=dtype, compute=compute)
    model = model_of(base).train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    x = X.to(dtype, copy=True).requires_grad_()
    y = model(x)
    y.float().square().sum().backward()
    assert y.dtype is x.grad.dtype is dtype
    A, B = (m["default"].weight for m in (model.base_model.layers["0"].lora_A, model.base_model.layers["0"].lora_B))
    assert A.grad.dtype is torch.float32
    W = floats(base)
    assert W.dtype is compute
    wanted = nn.functional.linear(x.double(), W.double() + 2 * B.double() @ A.double(), base.bias.double())
    assert float((y.double() - wanted).abs().max() / wanted.abs().max()) < (
        1e-5 if dtype is compute is torch.float32 else 0.02
    )


def test_without_autocast_adapters_have_the_compute_dtype():
    torch.manual_seed(0)
    base = nn.Sequential(four_bit(64, 32, dtype=torch.float16, compute=torch.bfloat16))
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["0"]), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}


def test_upstreams_layer_classes():
    from peft.tuners import lora
    from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt

    model = model_of(four_bit(64, 64), bnb_8bit(nn.Linear(64, 64)), nn.Linear(64, 64), targets="012")
    found = [[isinstance(m, c) for c in (Linear4bit, Linear8bitLt, lora.Linear)] for m in model.base_model.model]
    assert found == [[True, False, False], [False, True, False], [False, False, True]]
