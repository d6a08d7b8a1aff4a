"""Adaption prompt: the laws of a method, on whole models, whose attention it adapts."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import models
import pytest
import torch
from laws_table import base_tensors, gap, quiet, same_tensors, train_a_little, under_checkpointing
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import peft

BASES = ["llama", "llama_bias", "mistral", "gpt2", "llama_bf16"]
ANY = pytest.mark.parametrize("base", BASES)
IDS = models.inputs("llama")["input_ids"]
LONG = torch.arange(3, 48).reshape(3, 15)  # more tokens than heads · adapter_len


def config(**changes):
    """Four tokens in both layers."""
    return peft.AdaptionPromptConfig(**{"adapter_len": 3, "adapter_layers": 2, "task_type": "CAUSAL_LM", **changes})


@quiet
def wrapped(base, trained=True, **changes):
    """A model with an adapter, in eval mode."""
    torch.manual_seed(0)
    model = peft.get_peft_model(models.build(base), config(**changes))
    if trained:
        train_a_little(model)
    return model.eval()


@quiet
def with_second(base):
    """A model with two adapters, the first of them active."""
    model = wrapped(base)
    model.add_adapter("second", config(adapter_len=2, adapter_layers=1))
    train_a_little(model, "second", 5000)
    return model.eval()


@torch.no_grad()
def logits(model, ids=IDS, **call):
    """The model's logits."""
    return model(input_ids=ids, **call).logits


@ANY
def test_starts_as_the_base_bit_for_bit(base):
    model = wrapped(base, trained=False)
    assert torch.equal(logits(model), logits(models.build(base)))
    train_a_little(model)
    assert gap(logits(model), logits(models.build(base))) > 1e-3


@ANY
def test_disabled_and_unloaded_are_the_base(base):
    model, fresh = with_second(base), models.build(base)
    tensors = base_tensors(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(fresh))
    assert same_tensors(base_tensors(model), tensors)
    plain = model.unload()
    assert torch.equal(logits(plain), logits(fresh)) and same_tensors(
        dict(plain.state_dict()), dict(fresh.state_dict())
    )


def added(base, attention, x, prompt, gate, positions):
    """What the paper's formula adds to an attention module's output."""
    (batch, tokens, width), n = x.shape, prompt.shape[1]

    def heads(t):
        return t.view(t.shape[0], t.shape[1], -1, 4).transpose(1, 2)

    if base == "gpt2":
        q, k, v = (
            heads(t[..., i * width : (i + 1) * width]) for i, t in enumerate(map(attention.c_attn, (x, prompt, prompt)))
        )
    else:
        q, k, v = heads(attention.q_proj(x)), heads(attention.k_proj(prompt)), heads(attention.v_proj(prompt))
        q, _ = apply_rotary_pos_emb(q, q, *positions)
        k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
    found = (gate * (q @ k.transpose(2, 3) / 2).softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, -1)
    assert k.shape == (1, 4, n, 4)
    return found if base == "gpt2" else found @ attention.o_proj.weight.T


@pytest.mark.parametrize("ids", [IDS, LONG], ids=["short", "long"])
@pytest.mark.parametrize("base", ["llama", "llama_bias", "mistral", "gpt2"])
@torch.no_grad()
def test_computes_what_the_paper_says(base, ids):
    model = wrapped(base).double()
    fresh = models.build(base).double()
    tensors = {k: v.double() for k, v in peft.get_peft_model_state_dict(model).items()}
    for path in sorted({k.rpartition(".")[0] for k in tensors}):
        attention = fresh.get_submodule(path.removeprefix("base_model.model."))
        prompt, gate = tensors[f"{path}.adaption_prompt"], tensors[f"{path}.adaption_gate"]

        def add(module, args, kwargs, out, prompt=prompt, gate=gate):
            x = args[0] if args else kwargs["hidden_states"]
            return out[0] + added(base, module, x, prompt, gate, kwargs.get("position_embeddings")), *out[1:]

        attention.register_forward_hook(add, with_kwargs=True)
    assert gap(logits(model, ids), logits(fresh, ids)) < 1e-6


@ANY
def test_exactly_the_declared_tensors_get_gradients(base):
    model = with_second(base).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    found = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert found == {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(found) == 4 and all(n.endswith((".adaption_prompt.default", ".adaption_gate.default")) for n in found)
    attention = next(iter(model.base_model.layers.values()))
    assert attention.adaption_gate.grad is not None and attention.adaption_prompt.shape == (1, 3, models.WIDTH)


def test_gate_alone_learns_first():
    """While the gate is 0, the tokens behind it have no gradient."""
    model = wrapped("llama", trained=False).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    for layer in model.base_model.layers.values():
        assert layer.adaption_gate.grad.abs() > 0 and layer.adaption_prompt.grad.abs().sum() == 0


@ANY
@quiet
def test_files_hold_all_of_it(base, tmp_path):
    def near(found, wanted):  # a product's last bits depend on where in memory the file's tensors begin
        return gap(found, wanted) < (0.02 if found.dtype is torch.bfloat16 else 2e-6)

    model = with_second(base)
    first = logits(model)
    model.set_adapter("second")
    second = logits(model)
    model.save_pretrained(tmp_path)
    assert gap(first, second) > 1e-2
    loaded = peft.PeftModel.from_pretrained(models.build(base), tmp_path)
    assert near(logits(loaded), first) and not any(p.requires_grad for p in loaded.parameters())
    loaded.load_adapter(tmp_path / "second", "second")
    assert near(logits(loaded), first)
    loaded.set_adapter("second")
    assert near(logits(loaded), second)
    loaded.delete_adapter("second")
    assert loaded.active_adapters == ["default"] and near(logits(loaded), first)
    assert not any("second" in n for n, _ in loaded.named_parameters())
    again = peft.PeftModel.from_pretrained(models.build(base), tmp_path / "second", is_trainable=True)
    assert sum(p.requires_grad for p in again.parameters()) == 2


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch"])
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_copies_are_exact_and_independent(base, how):
    model = with_second(base)
    before = logits(model)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        twin = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert torch.equal(logits(twin), before)
    train_a_little(twin, "default", 77)
    twin_after = logits(twin)
    assert gap(twin_after, before) > 1e-3 and torch.equal(logits(model), before)
    twin.set_adapter("second")
    assert not torch.equal(logits(twin), twin_after) and torch.equal(logits(model), before)


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_keys_and_values_are_those_of_the_tensors_as_they_are(base):
    """Decoding keeps them, so everything that they are made from must be watched."""
    model = wrapped(base)
    seen = [logits(model), logits(model)]
    assert torch.equal(*seen)
    train_a_little(model, seed=50)
    seen.append(logits(model))
    layer = next(iter(model.base_model.layers.values()))
    with torch.no_grad():
        layer.kind.holder(layer.get_base_layer()).weight.mul_(1.1)
        if base == "llama":
            layer.get_base_layer().v_proj.weight.mul_(1.2)
    seen.append(logits(model))
    model.load_state_dict({k: v * 1.1 if "adaption" in k else v for k, v in model.state_dict().items()})
    seen.append(logits(model))
    assert all(gap(a, b) > 1e-4 for a, b in itertools.pairwise(seen[1:]))
    model.zero_grad()
    assert gap(model(input_ids=IDS).logits.detach(), seen[-1]) < 1e-6  # with gradients they are made anew


@pytest.mark.parametrize("base", ["llama", "mistral", "gpt2"])
@torch.no_grad()
def test_mixed_batch_is_row_by_row(base):
    model, names = with_second(base), ["second", "__base__", "default"]
    mixed = logits(model, LONG, adapter_names=names)
    for i, name in enumerate(names):
        alone = logits(model, LONG[i : i + 1], adapter_names=[name])
        assert gap(mixed[i : i + 1], alone) < 1e-5
    assert gap(mixed[1:2], logits(models.build(base), LONG[1:2])) < 1e-5


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_two_active_adapters_add_up_where_they_meet(base):
    model = with_second(base)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    model.base_model.set_adapter(["second", "default"])
    assert gap(logits(model), both) < 1e-5
    model.set_adapter("default")
    assert gap(logits(model), both) > 1e-4


@ANY
def test_generates_the_same_with_and_without_cache(base):
    model = wrapped(base)
    ids = torch.tensor([[1, 5, 9, 7], [1, 8, 2, 4]])
    cached, plain = (
        model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, use_cache=c) for c in (True, False)
    )
    assert torch.equal(cached, plain)
    with model.disable_adapter():
        alone = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(alone, models.build(base).generate(input_ids=ids, max_new_tokens=8, do_sample=False))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("base", ["llama", "gpt2"])
@quiet
def test_checkpointing_gives_the_same_gradients(base, reentrant):
    grads = under_checkpointing(lambda: wrapped(base), reentrant, input_ids=IDS, labels=IDS)
    assert all(gap(a, b) < 1e-5 for a, b in zip(*grads))


def test_compiles_into_one_graph():
    model = wrapped("llama")
    wanted = logits(model, use_cache=False)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert gap(logits(compiled, use_cache=False), wanted) < 1e-5


@torch.no_grad()
def test_a_head_stays_as_it_is():
    """The config has no modules_to_save, so a task's head is neither trained nor saved."""
    model = peft.get_peft_model(models.build("llama_classifier"), config(task_type="SEQ_CLS"))
    assert all("adaption" in n for n, p in model.named_parameters() if p.requires_grad)
    assert all("adaption" in k for k in peft.get_peft_model_state_dict(model))


@pytest.mark.parametrize(
    ("base", "changes", "error", "says"),
    [
        ("t5", {}, ValueError, "not of 't5'"),
        ("llama", {"adapter_len": None}, ValueError, "adapter_len is None"),
        ("llama", {"adapter_layers": None}, ValueError, "adapter_layers is None"),
        ("llama", {"adapter_layers": 3}, ValueError, "more than the 2 modules"),
        ("llama", {"target_modules": "mlp"}, ValueError, "not supported"),
        ("llama", {"target_modules": "attn"}, peft.NoMatchingPeftModuleError, "'attn' not found"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_no_trace(base, changes, error, says):
    model = models.build(base)
    keys = list(model.state_dict())
    with pytest.raises(error, match=says):
        peft.get_peft_model(model, config(**changes))
    assert list(model.state_dict()) == keys and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("field", ["adapter_len", "adapter_layers"])
def test_config_names_the_wrong_field(field):
    with pytest.raises(ValueError, match=f"{field} must be at least 1"):
        config(**{field: 0})


def test_cannot_be_merged_or_injected():
    model = wrapped("llama")
    before = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match="cannot be merged"):
            merge()
    assert torch.equal(logits(model), before)
    with pytest.raises(ValueError, match="cannot be injected"):
        peft.inject_adapter_in_model(config(), models.build("llama"))
