"""The two scripts of the seed document run as printed, on small local stand-ins for the names they use."""

from __future__ import annotations

import json
import re

import models
import pytest
import torch
from helpers import FIXTURES, chat_llama, offline, python, tiny_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from peft import PeftModel

SUMMARY = re.compile(r"trainable params: ([\d,]+) \|\| all params: ([\d,]+) \|\| trainable%: ([\d.]+)")


def run(name, cwd):
    """Run a script in a folder; returns what it printed."""
    env = offline(HF_HOME=str(cwd / "hub"), HF_DATASETS_CACHE=str(cwd / "cache"), ACCELERATE_USE_CPU="true")
    return python(str(FIXTURES / "run_seed.py"), str(FIXTURES / name), cwd=cwd, env=env)


def summary(printed: str) -> tuple[int, int, float]:
    """The numbers of print_trainable_parameters."""
    found = SUMMARY.search(printed)
    assert found, printed
    trainable, total = (int(x.replace(",", "")) for x in found.groups()[:2])
    return trainable, total, float(found[3])


def test_part_two_wraps_a_model(tmp_path):
    base = chat_llama()
    base.save_pretrained(tmp_path / "your-base-model-name")
    tiny_tokenizer().save_pretrained(tmp_path / "your-base-model-name")
    trainable, total, percent = summary(run("seed_part2.py", tmp_path))
    # r=16 on q_proj (16 -> 16) and v_proj (16 -> 8) of two layers
    assert trainable == 2 * 16 * ((16 + 16) + (16 + 8))
    assert total == trainable + base.num_parameters()
    assert percent == pytest.approx(100 * trainable / total, abs=1e-3)


def tiny_gpt2():
    """A GPT-2 with room for the tiny tokenizer."""
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = GPT2Config(vocab_size=264, n_embd=16, n_layer=2, n_head=2, n_positions=128, **tokens)
    return models.fill(GPT2LMHeadModel(config))


def wikitext(folder):
    """A folder that load_dataset("wikitext", "wikitext-2-v1") reads, with its three splits."""
    header = ["---", "configs:", "- config_name: wikitext-2-v1", "  data_files:"]
    for split, rows in [("train", 24), ("validation", 4), ("test", 4)]:
        header += [f"  - split: {split}", f"    path: {split}.jsonl"]
        lines = [json.dumps({"text": f" = Title {i} = " if i % 3 else f" line {i} of a text . "}) for i in range(rows)]
        folder.mkdir(exist_ok=True)
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "README.md").write_text("\n".join([*header, "---", ""]))


def test_part_four_trains_and_saves(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    wikitext(tmp_path / "wikitext")
    printed = run("seed_part4.py", tmp_path)
    trainable, total, _ = summary(printed)
    assert trainable == 2 * 8 * (16 + 48)  # r=8 on c_attn of two layers
    assert total == trainable + tiny_gpt2().num_parameters()

    folder = tmp_path / "peft_lora_gpt2_adapter"
    tensors = load_file(folder / "adapter_model.safetensors")
    prefix = "base_model.model.transformer.h"
    assert set(tensors) == {f"{prefix}.{i}.attn.c_attn.lora_{x}.weight" for i in (0, 1) for x in "AB"}
    assert all(value.abs().max() > 0 for value in tensors.values()), "B starts at zero, so training moved it"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 16, 0.05)
    assert config["target_modules"] == ["c_attn"]
    assert config["fan_in_fan_out"] is True
    assert config["base_model_name_or_path"] == "gpt2"
    assert AutoTokenizer.from_pretrained(folder).pad_token == "<pad>"
    assert (tmp_path / "peft_lora_gpt2" / "checkpoint-6" / "adapter_model.safetensors").exists()

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2")
    ids = torch.arange(6, 16).reshape(1, 10)
    with torch.no_grad():
        plain = base(ids).logits
        model = PeftModel.from_pretrained(base, folder)
        tuned = model(ids).logits
        assert (tuned - plain).abs().max() > 1e-6
        merged = model.merge_and_unload()(ids).logits
    torch.testing.assert_close(merged, tuned, atol=1e-5, rtol=1e-5)
