"""Laws on what an adapter computes: at the start, disabled, trained, merged, in a mixed batch, in every dtype."""

from __future__ import annotations

import pytest
import torch
from laws_table import (
    BY_NAME,
    EXAMPLES,
    SOME,
    base_tensors,
    bound,
    gap,
    oracle,
    quiet,
    same_tensors,
    train_a_little,
    with_second,
    wrapped,
)

import peft
from peft.core.adapter import Adapter

each = pytest.mark.parametrize("example", EXAMPLES, ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
MERGING = [e for e in EXAMPLES if e.merges]
HALF = {torch.float32: 0.0, torch.bfloat16: 0.02, torch.float16: 4e-3}


@each
@dtypes
@torch.no_grad()
def test_starts_as_the_base(example, dtype):
    model, x = wrapped(example, dtype, trained=False), example.inputs(dtype)
    difference = gap(model(x), example.make_base(dtype)(x))
    if example.identity is None:
        assert difference > 1e-2
    else:
        assert difference <= (example.identity if dtype is torch.float32 else max(example.identity and 0.02, 0.0))


@each
@dtypes
@torch.no_grad()
def test_training_changes_the_output(example, dtype):
    """Without this, the other laws would hold for an adapter that does nothing."""
    model, x = wrapped(example, dtype), example.inputs(dtype)
    assert gap(model(x), example.make_base(dtype)(x)) > 1e-2


@each
@dtypes
@torch.no_grad()
def test_disabled_is_the_base_bit_for_bit(example, dtype):
    model, x = wrapped(example, dtype), example.inputs(dtype)
    wanted, before = example.make_base(dtype)(x), model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), wanted)
    assert torch.equal(model(x), before)
    model.base_model.disable_adapter_layers()
    assert torch.equal(model(x), wanted)
    model.base_model.enable_adapter_layers()
    assert torch.equal(model(x), before)


@each
@torch.no_grad()
def test_unload_gives_the_base_back(example):
    model, x = wrapped(example), example.inputs()
    fresh = example.make_base()
    base = model.unload()
    assert [(n, type(m)) for n, m in base.named_modules()] == [(n, type(m)) for n, m in fresh.named_modules()]
    assert same_tensors(dict(base.state_dict()), dict(fresh.state_dict()))
    assert torch.equal(base(x), fresh(x))
    assert not hasattr(base, "peft_config")


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.base != "grouped"], ids=str)
@torch.no_grad()
def test_computes_what_the_formula_says(example):
    model = wrapped(example)
    if (formula := oracle(example, model)) is None:
        pytest.skip("no formula for a weight")
    assert gap(model(example.inputs()), formula(_double(example))) < max(example.tolerance, 2e-6)


@pytest.mark.parametrize("example", MERGING, ids=str)
@dtypes
@torch.no_grad()
def test_merged_is_unmerged(example, dtype):
    model, x = wrapped(example, dtype), example.inputs(dtype)
    before = model(x)
    model.merge_adapter()
    tolerance = example.tolerance if dtype is torch.float32 else example.half.get("merged", HALF[dtype])
    assert gap(model(x), before) <= tolerance
    if dtype is torch.float32 and (formula := oracle(example, model)) is not None:
        assert gap(model(x), formula(_double(example))) <= example.tolerance


@pytest.mark.parametrize("example", MERGING, ids=str)
@dtypes
@torch.no_grad()
def test_merged_weight_is_the_rounded_formula(example, dtype):
    """bfloat16: the nearest value to float32 arithmetic's; float32: within a few units in the last place."""
    model = wrapped(example, dtype)
    model.merge_adapter()
    for layer in model.base_model.layers.values():
        if not layer.merged:
            continue
        adapter = layer.adapters["default"]
        if type(adapter).merged_weight is Adapter.merged_weight:
            pytest.skip("not a function of one weight")
        W = layer.base_weight()
        wanted = adapter.merged_weight(W.double() if dtype is torch.float32 else W.float())
        found = layer.kind.canon(getattr(layer.get_base_layer(), layer.kind.param).detach())
        size = torch.maximum(wanted.abs().double(), W.abs().double()).clamp(min=0.1)
        error = (found.double() - wanted.double()).abs() / (torch.finfo(dtype).eps * size)
        units = max(8, example.tolerance / torch.finfo(dtype).eps)
        assert error.max() <= (units if dtype is torch.float32 else 0.51)


@pytest.mark.parametrize("example", MERGING, ids=str)
@dtypes
@torch.no_grad()
def test_unmerge_is_exact(example, dtype):
    model, x = wrapped(example, dtype), example.inputs(dtype)
    before, output = base_tensors(model), model(x)
    model.merge_adapter()
    assert example.name in ("saved_head",) or not same_tensors(base_tensors(model), before)
    model.unmerge_adapter()
    assert same_tensors(base_tensors(model), before)
    assert torch.equal(model(x), output)


@pytest.mark.parametrize("example", MERGING, ids=str)
@torch.no_grad()
@quiet
def test_merge_and_unload(example):
    model, x = wrapped(example), example.inputs()
    before = model(x)
    base = model.merge_and_unload()
    fresh = example.make_base()
    assert gap(base(x), before) <= example.tolerance
    assert [(n, type(m)) for n, m in base.named_modules()] == [(n, type(m)) for n, m in fresh.named_modules()]
    missing, more = set(fresh.state_dict()) - set(base.state_dict()), set(base.state_dict()) - set(fresh.state_dict())
    assert not missing and (not more or example.adds_bias)


@pytest.mark.parametrize("example", [e for e in EXAMPLES if not e.merges], ids=str)
@torch.no_grad()
def test_what_cannot_merge_says_so_and_stays(example):
    model, x = wrapped(example), example.inputs()
    before, tensors = model(x), base_tensors(model)
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        model.merge_adapter()
    assert torch.equal(model(x), before) and same_tensors(base_tensors(model), tensors)
    assert not any(layer.merged for layer in model.base_model.layers.values())


@pytest.mark.parametrize("name", ["linear", "dora", "tokens"])
@torch.no_grad()
def test_a_thousand_merges_in_bf16_leave_no_trace(name):
    model, x = wrapped(BY_NAME[name], torch.bfloat16), BY_NAME[name].inputs(torch.bfloat16)
    before, output = base_tensors(model), model(x)
    for _ in range(1000):
        model.merge_adapter()
        model.unmerge_adapter()
    assert same_tensors(base_tensors(model), before)
    assert torch.equal(model(x), output)


@each
@torch.no_grad()
def test_second_adapter_leaves_the_first_alone(example):
    model, x = wrapped(example), example.inputs()
    first = model(x)
    quiet(model.add_adapter)("second", example.make_config(**example.second))
    train_a_little(model, "second", 5000)
    model.eval()
    assert torch.equal(model(x), first)
    model.set_adapter("second")
    assert gap(model(x), first) > 1e-2
    formula = oracle(example, model, ("second",)) if example.base != "grouped" else None
    if formula is not None:
        assert gap(model(x), formula(_double(example))) <= max(example.tolerance, 2e-6)
    model.set_adapter("default")
    assert torch.equal(model(x), first)
    model.delete_adapter("second")
    assert torch.equal(model(x), first)


ALONE = ("saved_head", "tokens_beside")  # these may not be active together
PAIRS = [e for e in MERGING if e.several and e.name not in ALONE]


@pytest.mark.parametrize("example", PAIRS, ids=str)
@torch.no_grad()
def test_two_active_adapters_add_up(example):
    model, x = with_second(example), example.inputs()
    model.base_model.set_adapter(["default", "second"])
    both = model(x)
    if (formula := oracle(example, model, ("default", "second"))) is not None:
        assert gap(both, formula(_double(example))) <= max(example.tolerance, 2e-6)
    before = base_tensors(model)
    model.merge_adapter()
    assert gap(model(x), both) <= example.tolerance
    model.unmerge_adapter()
    assert same_tensors(base_tensors(model), before)
    assert torch.equal(model(x), both)


@pytest.mark.parametrize("example", PAIRS, ids=str)
@pytest.mark.parametrize("first", ["default", "second"])
@torch.no_grad()
@quiet
def test_merging_one_of_two_active_keeps_the_output(example, first):
    """The merged one is in the weight; the other goes on acting beside it."""
    model, x = with_second(example), example.inputs()
    model.base_model.set_adapter(["default", "second"])
    both, before = model(x), base_tensors(model)
    if first == "second" and not next(iter(model.base_model.layers.values())).adapters["default"].parallel:
        pytest.skip("the later one acts on what the earlier one made: the order of merging counts")
    model.merge_adapter([first])
    assert gap(model(x), both) <= example.tolerance
    model.merge_adapter(["second" if first == "default" else "default"])
    assert gap(model(x), both) <= example.tolerance
    model.unmerge_adapter()
    assert same_tensors(base_tensors(model), before) and torch.equal(model(x), both)


@torch.no_grad()
def test_merged_adapters_act_although_another_is_active():
    """Merging an adapter that is not active puts it into the weights; the active one still acts."""
    example = BY_NAME["linear"]
    model, x = with_second(example), example.inputs()
    model.merge_adapter(["second"])
    assert gap(model(x), oracle(example, model, ("default", "second"))(_double(example))) <= 2e-6


@each
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_mixed_batch_is_row_by_row(example, grad):
    model, x = with_second(example), example.inputs()
    names = (["second", "__base__", "default", "default", "second", "second"] * 2)[: len(x)]
    with torch.set_grad_enabled(grad):
        if not example.rows:
            with pytest.raises(ValueError, match="adapter_names cannot choose an adapter per sample"):
                model(x, adapter_names=names)
            return
        mixed = model(x, adapter_names=names)
        with model.disable_adapter():
            base = model(x)
        alone = {"__base__": base, "default": model(x)}
        model.set_adapter("second")
        alone["second"] = model(x)
        for i, name in enumerate(names):
            assert gap(mixed[i], alone[name][i]) <= 2e-6, (i, name)
        assert torch.equal(model(x), alone["second"])  # the call left no trace


@each
@torch.no_grad()
def test_one_name_for_all_rows_equals_switching(example):
    model, x = with_second(example), example.inputs()
    first = model(x)
    assert torch.equal(model(x, adapter_names="default"), first)
    assert torch.equal(model(x, adapter_names=["__base__"] * len(x)), example.make_base()(x))
    chosen = model(x, adapter_names=["second"] * len(x))
    assert torch.equal(model(x), first)
    model.set_adapter("second")
    assert torch.equal(model(x), chosen)


@pytest.mark.parametrize("kind", ["attention", "parameter_2d", "parameter_3d"])
def test_refused_mixed_batches_say_the_same_everywhere(kind):
    model = with_second(BY_NAME[kind])
    with pytest.raises(ValueError) as error:
        x = BY_NAME[kind].inputs()
        model(x, adapter_names=(["default", "second"] * 3)[: len(x)])
    assert "Run one batch per adapter" in str(error.value)


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("autocast", [True, False], ids=["fp32_adapter", "half_adapter"])
@quiet
def test_half_in_half_out(example, dtype, autocast):
    torch.manual_seed(0)
    model = peft.get_peft_model(example.make_base(dtype), example.make_config(), autocast_adapter_dtype=autocast)
    bound(model, example)
    adapters = [layer.adapters["default"] for layer in model.base_model.layers.values()]
    wanted = torch.float32 if autocast and example.casts else dtype
    assert all(p.dtype is wanted for a in adapters for p in a.parameters())
    train_a_little(model)
    for mode in (True, False):
        model.train(mode)
        y = model(example.inputs(dtype))
        assert y.dtype is dtype and y.isfinite().all()
        y.float().sum().backward()
    with torch.no_grad():
        assert model(example.inputs(dtype)).dtype is dtype
        single = wrapped(example)
        peft.set_peft_model_state_dict(single, peft.get_peft_model_state_dict(model))
        difference = gap(model.eval()(example.inputs(dtype)), single(example.inputs()))
        assert difference < example.half.get("single", 0.04 if dtype is torch.bfloat16 else 0.006)


@pytest.mark.parametrize("example", [e for e in SOME if e.base != "embedded"], ids=str)
@torch.no_grad()
def test_moving_while_merged_moves_what_was_put_aside(example):
    model = wrapped(example)
    wanted = {k: v.to(torch.bfloat16) for k, v in base_tensors(model).items()}
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    assert same_tensors(base_tensors(model), wanted)
    model.merge_adapter()
    model.to(torch.float64)
    model.unmerge_adapter()
    assert same_tensors(base_tensors(model), {k: v.double() for k, v in wanted.items()})
    model.merge_adapter()
    model.to("meta")
    model.unmerge_adapter()
    assert all(v.is_meta for v in base_tensors(model).values())


@pytest.mark.parametrize("example", SOME, ids=str)
@torch.no_grad()
def test_moving_keeps_outputs(example):
    model, x = wrapped(example), example.inputs()
    before = model(x)
    model.to(torch.float64)
    assert gap(model(x.double() if x.is_floating_point() else x), before) < 2e-6
    model.to(torch.float32)
    assert gap(model(x), before) < 2e-6


def _double(example):
    x = example.inputs()
    return x.double() if x.is_floating_point() else x
