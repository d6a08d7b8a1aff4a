"""Laws on copies: save and load, deepcopy, pickle, meta-device loading, tied heads."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import models
import pytest
import torch
from laws_table import (
    BY_NAME,
    EXAMPLES,
    SOME,
    base_tensors,
    bound,
    gap,
    quiet,
    same_tensors,
    train_a_little,
    with_second,
    wrapped,
)

import peft

each = pytest.mark.parametrize("example", EXAMPLES, ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def on_meta(model):
    """Names of parameters, buffers and other tensors of adapted layers that have no storage."""
    names = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    for path, layer in model.base_model.layers.items():
        for field in layer.adapter_cls.fields:
            for adapter in layer.adapters.values():
                value = getattr(adapter, field)
                if isinstance(value, torch.Tensor) and value.is_meta:
                    names.append(f"{path}.{field}")
    return names


@each
@dtypes
@torch.no_grad()
@quiet
def test_saved_and_loaded_is_the_same(example, dtype, tmp_path):
    model, x = wrapped(example, dtype), example.inputs(dtype)
    before = model(x)
    model.save_pretrained(tmp_path)
    assert torch.equal(model(x), before)
    loaded = bound(peft.PeftModel.from_pretrained(example.make_base(dtype), tmp_path), example)
    assert not loaded.training and not on_meta(loaded)
    assert torch.equal(loaded(x), before)
    assert not any(p.requires_grad for n, p in loaded.named_parameters())
    loaded.save_pretrained(tmp_path / "again")
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()
    config = "adapter_config.json"
    assert (tmp_path / "again" / config).read_bytes() == (tmp_path / config).read_bytes()


@each
@torch.no_grad()
@quiet
def test_loading_a_second_leaves_the_first_alone(example, tmp_path):
    model, x = with_second(example), example.inputs()
    first = model(x)
    model.set_adapter("second")
    second = model(x)
    model.save_pretrained(tmp_path)
    other = bound(peft.PeftModel.from_pretrained(example.make_base(), tmp_path), example)
    tensors = base_tensors(other)
    other.load_adapter(tmp_path / "second", "second")
    assert not on_meta(other) and same_tensors(base_tensors(other), tensors)
    assert other.active_adapters == ["default"] and torch.equal(other(x), first)
    other.set_adapter("second")
    assert torch.equal(other(x), second)
    other.load_adapter(tmp_path, "second")  # a name that is there gets the file's values in place
    assert torch.equal(other(x), first)
    other.set_adapter("default")
    other.delete_adapter("second")
    assert torch.equal(other(x), first)


@each
@torch.no_grad()
@quiet
def test_low_memory_loads_leave_nothing_on_meta(example, tmp_path):
    model, x = wrapped(example), example.inputs()
    before = model(x)
    model.save_pretrained(tmp_path)
    loaded = bound(peft.PeftModel.from_pretrained(example.make_base(), tmp_path, low_cpu_mem_usage=True), example)
    assert not on_meta(loaded) and torch.equal(loaded(x), before)
    loaded.load_adapter(tmp_path, "more", low_cpu_mem_usage=True)
    loaded.set_adapter("more")
    assert not on_meta(loaded) and torch.equal(loaded(x), before)
    empty = bound(peft.get_peft_model(example.make_base(), example.make_config(), low_cpu_mem_usage=True), example)
    assert on_meta(empty) or model.base_model.shared
    peft.set_peft_model_state_dict(empty, peft.get_peft_model_state_dict(model), low_cpu_mem_usage=True)
    assert not on_meta(empty) and torch.equal(empty.eval()(x), before)


@each
@torch.no_grad()
@quiet
def test_low_memory_load_of_part_of_a_file_initialises_the_rest(example, tmp_path):
    model = wrapped(example)
    tensors = peft.get_peft_model_state_dict(model)
    part = dict(list(tensors.items())[: max(1, len(tensors) // 2)])
    part |= {k: v for k, v in tensors.items() if not k.startswith("base_model.model.")}  # shared: needed by all
    model.save_pretrained(tmp_path)
    from safetensors.torch import save_file

    tensors = {k: v.clone().contiguous() for k, v in part.items()}  # layers may share some
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    loaded = bound(peft.PeftModel.from_pretrained(example.make_base(), tmp_path, low_cpu_mem_usage=True), example)
    assert not on_meta(loaded) and loaded(example.inputs()).isfinite().all()
    now = peft.get_peft_model_state_dict(loaded)
    assert all(torch.equal(now[k], v) for k, v in part.items())


@each
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch"])
@torch.no_grad()
@quiet
def test_copies_are_exact_and_independent(example, how):
    model, x = with_second(example), example.inputs()
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        twin = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    before = model(x)
    assert torch.equal(twin(x), before)
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in model.parameters()]
    twin.set_adapter("second")
    assert not torch.equal(twin(x), before)
    assert torch.equal(model(x), before) and model.active_adapters == ["default"]
    model.set_adapter("second")
    assert torch.equal(model(x), twin(x))
    train_a_little(twin, "second", 77)
    assert not torch.equal(model(x), twin(x))
    twin.set_adapter("default")
    with twin.disable_adapter():
        assert torch.equal(twin(x), example.make_base()(x))
    if example.merges:
        twin.merge_adapter()
        assert gap(twin(x), before) <= example.tolerance and torch.equal(model(x), model(x))
        twin.unmerge_adapter()
    assert torch.equal(twin(x), before)
    if example.rows:
        names = (["second", "__base__", "default"] * 4)[: len(x)]
        twin(x, adapter_names=names)


@pytest.mark.parametrize("example", SOME, ids=str)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@torch.no_grad()
def test_copies_of_a_merged_model_unmerge_exactly(example, how):
    model, x = wrapped(example), example.inputs()
    before = model(x)
    model.merge_adapter()
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(x), model(x))
    twin.unmerge_adapter()
    assert torch.equal(twin(x), before) and all(layer.merged for layer in model.base_model.layers.values())
    with twin.disable_adapter():
        assert torch.equal(twin(x), example.make_base()(x))


@pytest.mark.parametrize("example", [BY_NAME[n] for n in ("linear", "dora", "pissa")], ids=str)
@torch.no_grad()
def test_saving_while_merged_saves_the_adapter(example, tmp_path):
    model, x = wrapped(example), example.inputs()
    before = model(x)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert torch.equal(quiet(peft.PeftModel.from_pretrained)(example.make_base(), tmp_path)(x), before)


@torch.no_grad()
@quiet
def test_renamed_adapters_compute_the_same(tmp_path):
    """A name is only a place: the same file under another name, and beside others, gives the same bits."""
    example = BY_NAME["linear"]
    model, x = wrapped(example), example.inputs()
    before = model(x)
    model.save_pretrained(tmp_path)
    for name in ("lora", "weight", "lora_A", "default_1", "适配器", "a" * 64, "base_layer", "1"):
        other = peft.PeftModel.from_pretrained(example.make_base(), tmp_path, adapter_name=name)
        assert torch.equal(other(x), before), name
        other.save_pretrained(tmp_path / "out")
        again = peft.PeftModel.from_pretrained(example.make_base(), tmp_path / "out" / name, adapter_name="other")
        assert torch.equal(again(x), before), name


# -- tied heads --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("targets", [["lm_head"], ["lm_head", "q_proj"], ["embed_tokens"]], ids=str)
@torch.no_grad()
def test_lora_on_a_tied_head_survives_merge_save_and_reload(targets, tmp_path):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base, fresh = models.llama_tied(), models.llama_tied()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
        train_a_little(model)
        wanted = models.run(model.eval(), "llama")
        merged = model.merge_and_unload()
        merged.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    embedding = "model.embed_tokens.weight"
    assert gap(models.run(merged, "llama"), wanted) < 1e-4
    assert gap(models.run(again, "llama"), wanted) < 1e-4
    untouched = "lm_head.weight" if targets == ["embed_tokens"] else embedding
    for found in (merged, again):
        assert torch.equal(found.state_dict()[untouched], fresh.state_dict()[embedding])
    assert gap(models.run(fresh, "llama"), wanted) > 1e-2


@torch.no_grad()
@quiet
def test_tied_training_of_embedding_and_head_merges_to_one_weight():
    base = models.llama_tied()
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=4, target_modules=["embed_tokens"], ensure_weight_tying=True, task_type="CAUSAL_LM")
    )
    train_a_little(model)
    wanted = models.run(model.eval(), "llama")
    merged = model.merge_and_unload()
    assert gap(models.run(merged, "llama"), wanted) < 1e-4
    state = merged.state_dict()
    assert gap(state["lm_head.weight"], state["model.embed_tokens.weight"]) < 1e-6
