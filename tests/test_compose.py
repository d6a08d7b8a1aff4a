"""Compositions of adapters, and PeftStackedModel: several methods at once on one model."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from peft import (
    Average,
    BottleneckConfig,
    FusionConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    Parallel,
    PeftModel,
    PeftStackedModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    Split,
    Stack,
    VeraConfig,
    get_peft_model,
)

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 11, 12, 13]])
MASK = (IDS != 0).long()
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}


def layer():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8))


def llama(cls=LlamaForCausalLM):
    torch.manual_seed(0)
    return cls(LlamaConfig(**SIZES, **HEADS)).eval()


CONFIGS = {
    "lora": LoraConfig(target_modules=["0"], r=2, init_lora_weights=False),
    "loha": LoHaConfig(target_modules=["0"], r=2, init_weights=False),
    "ia3": IA3Config(target_modules=["0"], feedforward_modules=[], init_ia3_weights=False),
    "oft": OFTConfig(target_modules=["0"], oft_block_size=4, init_weights=False),
    "vera": VeraConfig(target_modules=["0"], r=2, init_weights=False),
}


@pytest.fixture
def several():
    torch.manual_seed(2)
    return get_peft_model(layer(), copy.deepcopy(CONFIGS)).eval()


def alone(model, name):
    model.set_adapter(name)
    return model(X)


def test_average_is_the_mean_of_what_each_does_alone(several):
    y = {name: alone(several, name) for name in CONFIGS}
    assert min((y[a] - y[b]).abs().max() for a in y for b in y if a != b) > 1e-3
    several.set_adapter(Average(*CONFIGS))
    torch.testing.assert_close(several(X), sum(y.values()) / len(y))
    several.set_adapter(Average("oft", "lora", weights=[0.3, 0.7]))
    torch.testing.assert_close(several(X), 0.3 * y["oft"] + 0.7 * y["lora"])
    with several.disable_adapter():
        base = several(X)
    assert torch.equal(base, layer()(X))
    several.set_adapter(Average("lora", "vera", weights=[1, 1]))
    torch.testing.assert_close(several(X), y["lora"] + y["vera"] - base)


def test_stack_is_one_after_the_other_and_nests(several):
    several.set_adapter(["lora", "ia3"])
    want = several(X)
    several.set_adapter(Stack("lora", "ia3"))
    torch.testing.assert_close(several(X), want)
    y = {name: alone(several, name) for name in ("oft", "loha")}
    several.set_adapter(Average(Stack("lora", "ia3"), Average("oft", "loha")))
    torch.testing.assert_close(several(X), (want + (y["oft"] + y["loha"]) / 2) / 2)
    several.set_adapter(Stack("lora", "oft"))
    with pytest.raises(ValueError, match=r"'oft'.*first"):
        several(X)


def test_split_and_parallel_choose_by_sample(several):
    y = {name: alone(several, name) for name in CONFIGS}
    several.set_adapter(Split("lora", "oft", "ia3"))
    torch.testing.assert_close(several(X), torch.cat([y["lora"][:2], y["oft"][2:4], y["ia3"][4:]]))
    several.set_adapter(Split("vera", "__base__", sizes=[5, 1]))
    torch.testing.assert_close(several(X), torch.cat([y["vera"][:5], layer()(X)[5:]]))
    several.set_adapter(Parallel("loha", "lora"))
    torch.testing.assert_close(several(X), torch.cat([y["loha"], y["lora"]]))
    with pytest.raises(ValueError, match="5 samples"):
        several.set_adapter(Split("lora", "oft"))
        several(X[:5])
    with pytest.raises(ValueError, match="sizes"):
        several.set_adapter(Split("lora", "oft", sizes=[1, 2]))
        several(X)
    several.set_adapter(Split("lora", "oft"))
    with pytest.raises(ValueError, match="PeftModel itself"):
        several.get_base_model()(X)


@pytest.mark.parametrize("block", [Average("lora", "ia3"), Split("lora", "ia3"), Parallel("lora", "ia3")])
def test_exactly_the_members_are_trained(several, block):
    several.train()
    several.set_adapter(block)
    several(X).pow(2).sum().backward()
    trained = {n.rpartition("lora_A.")[2].split(".")[0] for n, p in several.named_parameters() if p.grad is not None}
    with_grad = {n for n, p in several.named_parameters() if p.grad is not None}
    assert with_grad == {n for n, p in several.named_parameters() if p.requires_grad} and trained
    assert all(".lora." in n or ".ia3" in n for n in with_grad)


def test_composition_on_one_method_and_in_copies():
    model = get_peft_model(layer(), LoraConfig(target_modules=["0"], r=2, init_lora_weights=False), "a").eval()
    model.add_adapter("b", LoraConfig(target_modules=["0"], r=4, init_lora_weights=False))
    want = (alone(model, "a") + alone(model, "b")) / 2
    model.set_adapter(Average("a", "b"))
    for m in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(m(X), want)
    torch.testing.assert_close(model(X, adapter_names=["a"] * 6), model(X, adapter_names="a"))
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(X), want)
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mean", combination_type="cat")
    model.set_adapter("mean")
    torch.testing.assert_close(model(X), want)


def test_misuse_says_what_to_do(several):
    for make, word in (
        (lambda: Stack(), "at least one"),
        (lambda: Average("a", 3), "names"),
        (lambda: Split("a", Average("b", "c")), "names only"),
        (lambda: Average("a", "b", weights=[1]), "as many"),
        (lambda: Split("a", "b", sizes=[1, -1]), "sizes"),
    ):
        with pytest.raises(ValueError, match=word):
            make()
    with pytest.raises(ValueError, match="nope"):
        several.set_adapter(Average("lora", "nope"))
    several.set_adapter(Average("lora", "ia3"))
    with pytest.raises(ValueError, match="adapter_names"):
        several.merge_and_unload()
    with pytest.raises(ValueError, match="part of Average"):
        several.delete_adapter("ia3")
    several.delete_adapter("oft")
    attention = get_peft_model(nn.Sequential(nn.MultiheadAttention(8, 2)), LoraConfig(target_modules=["0"], r=2), "a")
    attention.add_adapter("b", LoraConfig(target_modules=["0"], r=2))
    with pytest.raises(ValueError, match="do not act on an output"):
        attention.set_adapter(Average("a", "b"))


def causal(prompt=PrefixTuningConfig, **options):
    how = {"task_type": "CAUSAL_LM"}
    configs = {
        "lora": LoraConfig(init_lora_weights=False, **how),
        "ia3": IA3Config(init_ia3_weights=False, **how),
        "prompt": prompt(num_virtual_tokens=3, **how, **options),
    }
    torch.manual_seed(3)
    return get_peft_model(llama(), configs)


@pytest.mark.parametrize("prompt", [PrefixTuningConfig, PromptTuningConfig])
def test_prompt_beside_adapters_trains_saves_and_loads(prompt, tmp_path):
    model = causal(prompt)
    assert type(model) is PeftStackedModel and model.active_adapters == ["lora", "ia3", "prompt"]
    model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss.backward()
    with_grad = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert with_grad == {n for n, p in model.named_parameters() if p.requires_grad}
    assert {w for n in with_grad for w in ("lora", "ia3", "prompt") if w in n} == {"lora", "ia3", "prompt"}
    model.eval()
    want = model(input_ids=IDS, attention_mask=MASK).logits
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS, attention_mask=MASK).logits, llama()(IDS, attention_mask=MASK).logits)
    assert torch.equal(model(input_ids=IDS, attention_mask=MASK).logits, want)
    for m in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(m(input_ids=IDS, attention_mask=MASK).logits, want)

    model.save_pretrained(tmp_path)
    loaded = PeftStackedModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(loaded(input_ids=IDS, attention_mask=MASK).logits, want) and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    again = PeftStackedModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == with_grad
    for name in ("lora", "ia3", "prompt"):
        model.set_adapter(name)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            single = PeftModel.from_pretrained(llama(), tmp_path / name)
        torch.testing.assert_close(
            model(input_ids=IDS, attention_mask=MASK).logits, single(input_ids=IDS, attention_mask=MASK).logits
        )


def test_composition_is_saved_and_a_broken_file_refused(tmp_path):
    model = causal().eval()
    model.set_adapter([Average(Stack("lora", "ia3"), "lora", weights=[0.4, 0.6]), "prompt"])
    want = model(input_ids=IDS, attention_mask=MASK).logits
    model.save_pretrained(tmp_path)
    loaded = PeftStackedModel.from_pretrained(llama(), tmp_path)
    assert loaded.state.block == model.state.block
    assert torch.equal(loaded(input_ids=IDS, attention_mask=MASK).logits, want)
    (tmp_path / "adapter_stack.json").write_text('{"adapters": ["lora"], "active": [{"kind": "Melt", "members": []}]}')
    base = llama()
    with pytest.raises(ValueError, match="damaged"):
        PeftStackedModel.from_pretrained(base, tmp_path)
    with pytest.raises(ValueError, match="no adapter_stack"):
        PeftStackedModel.from_pretrained(base, tmp_path / "lora")
    assert not hasattr(base, "peft_config")


@pytest.mark.parametrize(
    ("acting", "left"),
    [
        (["lora", "ia3", "prompt"], ["ia3", "prompt"]),
        ([Average("lora", "ia3")], ["ia3"]),
        ("lora", ["ia3"]),
    ],
)
def test_a_part_of_a_stack_can_be_saved(acting, left, tmp_path):
    """What acts after loading names no adapter that the folder lacks."""
    model = causal().eval()
    model.set_adapter(acting)
    model.save_pretrained(tmp_path, selected_adapters=["ia3", "prompt"])
    loaded = PeftStackedModel.from_pretrained(llama(), tmp_path)
    assert set(loaded.peft_config) == {"ia3", "prompt"} and loaded.active_adapters == left
    model.set_adapter(left)
    want = model(input_ids=IDS, attention_mask=MASK).logits
    assert torch.equal(loaded(input_ids=IDS, attention_mask=MASK).logits, want)


@pytest.mark.parametrize("when", ["before", "after"])
def test_prefix_with_lora_under_checkpointing(when):
    losses, grads = [], []
    for checkpointing in (False, True):
        base = llama().train()
        if checkpointing and when == "before":
            base.gradient_checkpointing_enable()
        torch.manual_seed(3)
        model = get_peft_model(
            base,
            {
                "lora": LoraConfig(init_lora_weights=False),
                "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
            },
        )
        if checkpointing and when == "after":
            model.gradient_checkpointing_enable()
        loss = model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss
        loss.backward()
        losses.append(loss.detach())
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("beams", [1, 4])
def test_prefix_with_lora_generates_the_same_with_and_without_cache(beams):
    model = causal().eval()
    how = {"attention_mask": MASK, "max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    cached, plain = (model.generate(input_ids=IDS, use_cache=c, **how) for c in (True, False))
    assert torch.equal(cached, plain)
    one = model.generate(input_ids=IDS[1:, 2:], max_new_tokens=6, do_sample=False, num_beams=beams)
    assert torch.equal(one[0, 3:], cached[1, 5:])  # left padding changes nothing
    model.set_adapter(["lora", "ia3"])
    assert not torch.equal(model.generate(input_ids=IDS, **how), cached)


def test_head_goes_with_the_first_adapter():
    how = {"task_type": "SEQ_CLS"}
    model = get_peft_model(
        llama(LlamaForSequenceClassification),
        {"lora": LoraConfig(**how), "prompt": PromptTuningConfig(num_virtual_tokens=2, **how)},
    )
    model(input_ids=IDS, attention_mask=MASK, labels=torch.tensor([0, 1])).loss.backward()
    assert model.get_base_model().score.modules_to_save["lora"].weight.grad.abs().sum() > 0
    assert model.prompt_encoder["prompt"].embedding.weight.grad.abs().sum() > 0


def test_prompts_come_and_go():
    model = causal().eval()
    both = model(input_ids=IDS, attention_mask=MASK).logits
    model.add_adapter("other", PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    assert torch.equal(model(input_ids=IDS, attention_mask=MASK).logits, both)
    with pytest.raises(ValueError, match="one prompt"):
        model.set_adapter(["lora", "prompt", "other"])
    model.set_adapter(["lora", "other"])
    assert (model(input_ids=IDS, attention_mask=MASK).logits[:, -5:] - both).abs().max() > 1e-3
    with pytest.raises(ValueError, match="prompt 'other' is active"):
        model.merge_and_unload()
    model.delete_adapter(["prompt", "other"])
    assert model.active_adapters == ["lora"] and not any("prompt_encoder" in n for n, _ in model.named_modules())
    want = model(input_ids=IDS, attention_mask=MASK).logits
    torch.testing.assert_close(model.merge_and_unload()(IDS, attention_mask=MASK).logits, want, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="at least one adapter on layers"):
        get_peft_model(llama(), {"p": PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")})


def test_a_new_prompt_leaves_what_acts_alone():
    model = causal().eval()
    model.set_adapter([Average("lora", "ia3"), "prompt"])
    before = model(input_ids=IDS, attention_mask=MASK).logits
    model.add_adapter("other", PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    assert model.state.block == Average("lora", "ia3") and model.active_adapters == ["lora", "ia3", "prompt"]
    assert torch.equal(model(input_ids=IDS, attention_mask=MASK).logits, before)


def members():
    return {
        "a": LoraConfig(target_modules=["0"], r=2, init_lora_weights=False),
        "b": BottleneckConfig(target_modules=["0"], bottleneck_size=3, init_weights=False),
        "c": OFTConfig(target_modules=["0"], oft_block_size=4, init_weights=False),
    }


def test_fusion_attends_to_what_each_adapter_makes(tmp_path):
    torch.manual_seed(4)
    model = get_peft_model(layer(), {**members(), "fused": FusionConfig(adapters=["a", "b", "c"])}).eval()
    z = torch.stack([alone(model, name) for name in "abc"]).double()
    model.set_adapter("fused")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.3)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {n.rpartition(".fusion_")[2] for n in trained} == {"query.fused", "key.fused", "value.fused"}
    Q, K, V = (
        next(p for n, p in trained.items() if f"fusion_{part}" in n).double() for part in ("query", "key", "value")
    )
    y = layer()(X).double()
    scores = torch.einsum("nd,mnd->nm", y @ Q, z @ K) / 8**0.5
    want = y + torch.einsum("nm,mnd->nd", scores.softmax(1), z - y) @ V
    torch.testing.assert_close(model(X), want.float())

    model(X).sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(trained)
    model.save_pretrained(tmp_path)
    loaded = PeftStackedModel.from_pretrained(layer(), tmp_path, check_base=False)
    assert torch.equal(loaded(X), model(X))
    with model.disable_adapter():
        assert torch.equal(model(X), layer()(X))
    model.set_adapter(Average("fused", "a"))
    with pytest.raises(ValueError, match="mixed by 'fused'"):
        model.delete_adapter("b")
    with pytest.raises(NotImplementedError, match="no fixed weight"):
        model.set_adapter("fused")
        model.merge_and_unload()


def test_fusion_needs_its_adapters():
    with pytest.raises(ValueError, match=r"names \['nope'\]"):
        get_peft_model(layer(), {**members(), "fused": FusionConfig(adapters=["a", "nope"])})
    with pytest.raises(ValueError, match=r"names \['a'\]"):
        get_peft_model(layer(), FusionConfig(adapters=["a"]))
    for wrong in (None, [], "a", ["a", "a"]):
        with pytest.raises(ValueError, match=r"FusionConfig\.adapters"):
            FusionConfig(adapters=wrong)


def test_fusion_of_adapters_on_blocks():
    blocks = {"variant": "pfeiffer", "task_type": "CAUSAL_LM", "init_weights": False}
    model = get_peft_model(
        llama(),
        {"a": BottleneckConfig(**blocks), "b": BottleneckConfig(**blocks), "f": FusionConfig(adapters=["a", "b"])},
    )
    model.set_adapter("f")
    loss = model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss
    loss.backward()
    with_grad = [n for n, p in model.named_parameters() if p.grad is not None]
    assert len(with_grad) == 2 * 3 and all(".fusion_" in n for n in with_grad)
