"""transformers' own adapter methods on a plain model, and its Auto classes on adapter folders."""

from __future__ import annotations

import json

import models
import pytest
import torch
from helpers import FIXTURES
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, pipeline

import peft
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model

BASE = "llama"


def out(model):
    return models.run(model.eval(), BASE)


def same(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def config(**changes):
    """A LoRA that has an effect from the start."""
    return LoraConfig(**{"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **changes})


def test_switching_adapters_on_a_plain_model():
    model = models.build(BASE)
    base = out(model)
    model.add_adapter(config(), adapter_name="one")
    one = out(model)
    model.add_adapter(config(r=4, target_modules=["k_proj"]), adapter_name="two")
    assert model.active_adapters() == ["two"]
    two = out(model)
    model.set_adapter(["one", "two"])
    both = out(model)
    results = [base, one, two, both]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(results) for b in results[:i])
    model.disable_adapters()
    same(out(model), base)
    model.enable_adapters()
    same(out(model), both)
    model.set_adapter("one")
    same(out(model), one)
    model.delete_adapter("two")
    same(out(model), one)
    assert not any("two" in name for name, _ in model.named_parameters())
    assert set(model.peft_config) == {"one"}
    with pytest.raises(ValueError):
        model.set_adapter("two")


def test_only_the_added_adapter_trains():
    model = models.build(BASE)
    model.add_adapter(config(), adapter_name="one")
    assert all(p.requires_grad == ("lora_" in n) for n, p in model.named_parameters())
    model(**models.inputs(BASE), labels=models.inputs(BASE)["input_ids"]).loss.backward()
    assert all((p.grad is not None) == ("lora_" in n) for n, p in model.named_parameters())


def test_save_and_load_adapter(tmp_path):
    model = models.build(BASE)
    model.add_adapter(config(), adapter_name="default")
    wanted = out(model)
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in keys
    assert len(keys) == 8
    fresh = models.build(BASE)
    fresh.load_adapter(str(tmp_path))
    same(out(fresh), wanted)
    same(out(PeftModel.from_pretrained(models.build(BASE), str(tmp_path))), wanted)


def test_get_adapter_state_dict():
    model = models.build(BASE)
    model.add_adapter(config(), adapter_name="one")
    model.add_adapter(config(target_modules=["k_proj"]), adapter_name="two")
    found = model.get_adapter_state_dict("one")
    assert len(found) == 8
    key = "model.layers.1.self_attn.v_proj.lora_B.weight"
    assert torch.equal(found[key], model.get_parameter(key.replace("weight", "one.weight")))


@pytest.mark.parametrize(
    "name", ["linear", "rslora", "dora_linear", "patterns", "modules_to_save", "tokens_list", "embedding_llama"]
)
def test_load_adapter_reads_upstream_files(name):
    if name == "dora_linear" and peft.__version__ == "0.21.2":
        pytest.xfail("upstream does not rename lora_magnitude_vector for transformers' loader")
    model = models.build(BASE)
    model.load_adapter(str(FIXTURES / "upstream" / name))
    same(out(model), load_file(FIXTURES / "upstream" / name / "expected.safetensors")["output"])


def test_hotswap_through_transformers(tmp_path):
    for seed, name in enumerate(["first", "next"]):
        torch.manual_seed(seed)
        get_peft_model(models.build(BASE), config(r=4)).save_pretrained(str(tmp_path / name))
    wanted = out(PeftModel.from_pretrained(models.build(BASE), str(tmp_path / "next")))
    model = models.build(BASE)
    model.load_adapter(str(tmp_path / "first"), adapter_name="slot")
    assert (out(model) - wanted).abs().max() > 1e-3
    model.load_adapter(str(tmp_path / "next"), adapter_name="slot", hotswap=True)
    same(out(model), wanted)


@pytest.fixture
def saved(tmp_path):
    """A base model folder and an adapter folder that names it, with the output of the two together."""
    models.build(BASE).save_pretrained(tmp_path / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config(task_type="CAUSAL_LM", modules_to_save=["norm"])
    )
    models.perturb(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter", out(model)


def test_auto_classes_find_the_base_of_an_adapter(saved):
    folder, wanted = saved
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(folder.parent / "base")
    same(out(AutoModelForCausalLM.from_pretrained(folder)), wanted)
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    same(out(model), wanted)
    assert not any(p.requires_grad for p in model.parameters())
    trainable = AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=True)
    assert {n.split(".")[-3] for n, p in trainable.named_parameters() if p.requires_grad} == {
        "lora_A",
        "lora_B",
        "modules_to_save",
    }


def test_generation_and_merging(saved):
    folder, _ = saved
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    ids = models.inputs(BASE)["input_ids"]
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1}
    with model.disable_adapter():
        plain = model.generate(input_ids=ids, **settings)
    wanted = model.generate(input_ids=ids, **settings)
    assert wanted.shape == (2, 15)
    assert not torch.equal(wanted, plain)
    assert torch.equal(model.generate(input_ids=ids, num_beams=1, use_cache=False, **settings), wanted)
    merged = model.merge_and_unload()
    assert type(merged).__name__ == "LlamaForCausalLM"
    assert not any("lora" in name or "base_layer" in name for name in merged.state_dict())
    assert torch.equal(merged.generate(input_ids=ids, **settings), wanted)
    merged.save_pretrained(folder.parent / "merged")
    same(out(AutoModelForCausalLM.from_pretrained(folder.parent / "merged")), out(merged))


def test_pipeline_takes_a_peft_model(saved):
    from helpers import chat_llama, tiny_tokenizer

    model = get_peft_model(chat_llama(), config(task_type="CAUSAL_LM"))
    generate = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer())
    text = generate("hello", max_new_tokens=4, do_sample=False, return_full_text=True)[0]["generated_text"]
    assert text.startswith("hello")
