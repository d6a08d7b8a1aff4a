"""Merging from a quantized base: into floats, into the original files, and back; each with a report."""

from __future__ import annotations

import json

import models
import pytest
import torch
from helpers import needs
from storages import STORAGES, quantized
from torch import nn

import peft
from peft import quant
from peft.errors import CheckpointError, MergeError

pytestmark = pytest.mark.skipif(bool(needs("bitsandbytes")), reason="needs bitsandbytes")
STORAGE = {s.name: s for s in STORAGES}
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])
QV = ["q_proj", "v_proj", "down_proj"]
LIBRARIES = ["nf4", "nf4_double", "int8"]


def llama():
    return models.llama(hidden_size=64, intermediate_size=128, head_dim=16)


def base(storage="nf4"):
    """A tiny Llama whose linear layers, except for the head, are quantized as transformers does it."""
    model = llama()
    head, model.lm_head = model.lm_head, nn.Identity()
    model = quantized(model, STORAGE[storage])
    model.lm_head = head
    model.is_loaded_in_4bit = model.is_quantized = True
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    return model.eval()


@torch.no_grad()
def adapted(model, size=0.1, method="LoraConfig", **config):
    """An adapter whose effect is `size` of each weight's norm, for LoRA."""
    config = {"target_modules": QV, **config}
    torch.manual_seed(0)
    if method == "LoraConfig":
        config = {"r": 4, "init_lora_weights": False, **config}
    model = peft.get_peft_model(model, getattr(peft, method)(**config)).eval()
    if method == "LoraConfig":
        for layer in model.base_model.layers.values():
            ratio = layer.get_delta_weight("default").norm() / layer.base_weight().norm()
            layer.lora_B["default"].weight *= size / ratio
    return model


def logits(model):
    """In training mode, where libraries multiply exactly; nothing here has dropout."""
    with torch.no_grad():
        return model.train()(input_ids=IDS).logits


@pytest.mark.parametrize("storage", LIBRARIES)
def test_into_floats_nothing_is_lost(storage):
    model = adapted(base(storage), 0.03)
    wanted = logits(model)
    merged = model.eval().merge_and_unload(target="dequantized", verify=True)
    assert not any(quant.find(m).name for m in merged.modules())
    assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear
    torch.testing.assert_close(logits(merged), wanted, rtol=0, atol=2e-5)
    report = merged.merge_report
    assert report.target == "dequantized" and report.error < 1e-4
    assert len(report.layers) == 6 and all(0.029 < m.size < 0.031 for m in report.layers)
    assert report.outputs.error < 1e-3
    assert not hasattr(merged, "peft_config") and not merged.is_loaded_in_4bit
    assert not hasattr(merged.config, "quantization_config")


def test_a_float_model_of_another_dtype():
    model = adapted(base(), 0.03)
    wanted = logits(model)
    merged = model.merge_and_unload(target="dequantized", dtype=torch.bfloat16)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert 0.02 < merged.merge_report.error < 0.2  # what bfloat16 rounds away of a small adapter
    assert (logits(merged).float() - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("method", ["LoHaConfig", "OFTConfig", "IA3Config", "BeftConfig"])
def test_other_methods(method):
    config = {"oft_block_size": 8} if method == "OFTConfig" else {}
    config |= {"feedforward_modules": ["down_proj"]} if method == "IA3Config" else {}
    model = adapted(base(), method=method, **config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn(p.shape)
    wanted = logits(model)
    merged = model.merge_and_unload(target="dequantized")
    torch.testing.assert_close(logits(merged), wanted, rtol=0, atol=5e-5)


def test_requantizing_that_loses_the_adapter_is_refused():
    model = adapted(base(), 0.03)
    before, tensors = logits(model), peft.get_base_model_state_dict(model)
    tensors = {k: v.clone() for k, v in tensors.items()}
    with pytest.raises(MergeError, match=r"would lose \d+% of .* most in .*down_proj.* target='dequantized'"):
        model.merge_and_unload()
    assert torch.equal(logits(model), before)
    after = peft.get_base_model_state_dict(model)
    assert all(torch.equal(after[k], v) for k, v in tensors.items())
    with pytest.raises(MergeError, match="would lose"):
        model.merge_and_unload(target="requantized")
    merged = model.merge_and_unload(force=True, verify=True)
    assert merged.merge_report.error > 0.9
    assert merged.merge_report.outputs.error > 0.5
    assert quant.find(merged.model.layers[0].self_attn.q_proj).name == "bnb 4bit"
    assert "lost of the adapter's effect: " in str(merged.merge_report)


def test_requantizing_what_survives_it():
    model = adapted(base("int8"), 0.1)
    wanted = logits(model)
    merged = model.merge_and_unload()
    assert merged.merge_report.error < 0.2
    assert (logits(merged) - wanted).norm() < 0.05 * wanted.norm()
    large = adapted(base(), 0.8).merge_and_unload(max_error=0.25)
    assert large.merge_report.error < 0.25


def test_two_adapters_are_rounded_once():
    model = adapted(base(), 0.3)
    model.add_adapter("other", peft.LoraConfig(r=4, target_modules=QV, init_lora_weights=False))
    layer = model.base_model.layers["model.layers.0.self_attn.q_proj"]
    with torch.no_grad():
        wanted = layer.adapted_weight([layer.adapters["default"], layer.adapters["other"]], layer.base_weight())
    alone = STORAGE["nf4"].quantize(nn.Linear(64, 64, bias=False))
    alone.weight = quant.find(alone).pack(alone, wanted, alone.weight)
    model.merge_adapter(["default", "other"])
    assert torch.equal(layer.get_base_layer().weight.data, alone.weight.data)


def test_what_is_merged_already_is_part_of_it():
    model = adapted(base(), 0.3)
    wanted = logits(model)
    model.merge_adapter()
    merged = model.merge_and_unload(target="dequantized")
    torch.testing.assert_close(logits(merged), wanted, rtol=0, atol=2e-5)


# -- the original weights -----------------------------------------------------------------------------------------
@pytest.fixture(params=["one", "several"])
def original(request, tmp_path):
    llama().to(torch.bfloat16).save_pretrained(
        tmp_path / "original", max_shard_size="10GB" if request.param == "one" else "40KB"
    )
    return tmp_path / "original"


def expected(model):
    """The original in bfloat16 with the adapter's update added to it."""
    wanted = llama().to(torch.bfloat16)
    with torch.no_grad():
        for path, layer in model.base_model.layers.items():
            W = wanted.get_submodule(path).weight
            W.copy_((W.float() + layer.get_delta_weight("default")).to(torch.bfloat16))
    return wanted.state_dict()


def test_into_the_original_in_memory(original):
    model = adapted(base(), 0.1)
    wanted = expected(model)
    merged = model.merge_and_unload(target="original", original=original)
    found = merged.state_dict()
    linear = [k for k in wanted if "proj" in k]
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[k].to(torch.bfloat16), wanted[k]) for k in linear)
    assert 0.5 < merged.merge_report.error < 1.5  # against what was trained: the quantization noise is gone


def test_into_the_original_in_files(original, tmp_path):
    model = adapted(base(), 0.1, modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight += 1
    before, wanted = logits(model), expected(model)
    wanted["lm_head.weight"] = (llama().lm_head.weight + 1).to(torch.bfloat16)
    report = peft.save_merged(model, tmp_path / "merged", original)
    assert torch.equal(logits(model), before)
    names = {p.name for p in (tmp_path / "merged").iterdir()}
    assert names == {p.name for p in original.iterdir()} | {"merge_report.json"}
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[k], wanted[k]) for k in wanted)
    assert json.loads((tmp_path / "merged" / "merge_report.json").read_text())["error"] == report.error
    with pytest.raises(CheckpointError, match="not empty"):
        peft.save_merged(model, tmp_path / "merged", original)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_files_are_read_one_at_a_time(original, tmp_path, monkeypatch):
    from peft.storage import shards

    opened, alive = shards.Shards.open, []

    def open_counted(self, name):
        alive.append(name)
        return opened(self, name)

    monkeypatch.setattr(shards.Shards, "open", open_counted)
    peft.save_merged(adapted(base()), tmp_path / "merged", original)
    files = sorted(p.name for p in original.glob("*.safetensors"))
    assert alive == files * 2  # headers first, then each once


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_layers_that_were_conv1d_become_conv1d_again(bits, tmp_path):
    """transformers turns their weights round when it quantizes them; files of GPT-2 hold them as they were."""
    from transformers import BitsAndBytesConfig, GPT2LMHeadModel

    wide = {"n_embd": 64, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    models.gpt2(**wide).save_pretrained(tmp_path / "original")
    how = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4")

    def quantized_gpt2(**options):
        base = GPT2LMHeadModel.from_pretrained(tmp_path / "original", quantization_config=how, dtype=torch.float32)
        return adapted(base, target_modules=["c_attn", "c_proj"], **options)  # attn.c_proj is square

    def read(folder):
        return logits(GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32))

    model = quantized_gpt2()
    wanted = logits(model)
    peft.save_merged(model, tmp_path / "streamed", tmp_path / "original")
    model.merge_and_unload(target="dequantized").save_pretrained(tmp_path / "dequantized")
    torch.testing.assert_close(read(tmp_path / "dequantized"), wanted, rtol=0, atol=1e-5)
    merged = quantized_gpt2().merge_and_unload(target="original", original=tmp_path / "original")
    merged.save_pretrained(tmp_path / "merged")
    near = adapted(models.gpt2(**wide), target_modules=["c_attn", "c_proj"])
    near.load_state_dict({k: v for k, v in quantized_gpt2().state_dict().items() if "lora_" in k}, strict=False)
    for folder in ("merged", "streamed"):
        torch.testing.assert_close(read(tmp_path / folder), logits(near), rtol=0, atol=1e-5)


def test_loftq_on_quantized_layers_that_were_conv1d(tmp_path):
    from transformers import BitsAndBytesConfig, GPT2LMHeadModel

    original = models.gpt2(n_embd=64)
    original.save_pretrained(tmp_path)
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = GPT2LMHeadModel.from_pretrained(tmp_path, quantization_config=how, dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(r=64, lora_alpha=64, target_modules=["c_attn", "attn.c_proj"]))
    peft.replace_lora_weights_loftq(model)
    for path, layer in model.base_model.layers.items():
        whole = layer.base_weight() + layer.get_delta_weight("default")  # of full rank
        torch.testing.assert_close(whole, original.get_submodule(path).weight.T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("wrong", ["missing", "other", "shape", "none"])
def test_wrong_originals_are_refused_before_anything_changes(wrong, tmp_path):
    folder = tmp_path / "original"
    if wrong == "other":
        models.gpt2().save_pretrained(folder)
    elif wrong == "shape":
        models.llama(hidden_size=32, intermediate_size=128, head_dim=16).save_pretrained(folder)
    elif wrong == "none":
        folder.mkdir()
    model = adapted(base())
    before = logits(model)
    for call in (
        lambda: model.merge_and_unload(target="original", original=folder),
        lambda: peft.save_merged(model, tmp_path / "merged", folder),
    ):
        with pytest.raises(CheckpointError, match=r"original|lacks|shape|safetensors"):
            call()
    assert torch.equal(logits(model), before)
    assert [p.name for p in tmp_path.iterdir()] == ([] if wrong == "missing" else ["original"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"target": "floats"}, "'requantized', 'dequantized', 'original'"),
        ({"target": "original"}, "belong together"),
        ({"original": "x"}, "belong together"),
        ({"dtype": torch.bfloat16}, "dtype"),
        ({"target": "dequantized", "dtype": torch.int8}, "float dtype"),
    ],
)
def test_wrong_options(options, says):
    with pytest.raises(MergeError, match=says):
        adapted(base()).merge_and_unload(**options)


# -- float bases ----------------------------------------------------------------------------------------------------
def test_float_models_are_verified_too():
    model = adapted(llama())
    merged = model.merge_and_unload(verify=True)
    report = merged.merge_report
    assert report.target == "float" and report.error < 1e-5
    assert report.outputs.error < 1e-4 and report.outputs.largest < 1e-5
    half = adapted(llama().to(torch.bfloat16), 0.01).merge_and_unload(verify=True)
    assert 0.05 < half.merge_report.error < 0.5
    assert not hasattr(adapted(llama()).merge_and_unload(), "merge_report")


def test_inputs_of_ones_own():
    model = peft.get_peft_model(models.Mlp(), peft.LoraConfig(target_modules=["lin0"], init_lora_weights=False))
    x = torch.linspace(-1, 1, 3 * models.WIDTH).view(3, -1)
    wanted = model.eval()(x)
    merged = model.merge_and_unload(inputs=x)
    assert merged.merge_report is not None
    assert (merged(x) - wanted).abs().max() < 1e-5
