"""A base model for the road's tests: the Chinese one where it is found, and always a tiny one with random weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def assets() -> Path | None:
    """The folder of models: $PEFT_ASSETS, else `shared/models` in or beside the checkout."""
    places = [os.environ.get("PEFT_ASSETS"), ROOT / "shared" / "models", ROOT.parent / "shared" / "models"]
    return next((Path(p) for p in places if p and (Path(p) / "minimind2-small-zh" / "config.json").is_file()), None)


@pytest.fixture(scope="session")
def chinese():
    folder = assets()
    if folder is None:
        pytest.skip("the Chinese test model is not here; PEFT_ASSETS names its folder")
    return folder / "minimind2-small-zh"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A two-layer Llama with random weights, a byte-level tokenizer and a chat template."""
    return make_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def wide_tiny(tmp_path_factory):
    """The same, as wide as the blocks of 64 numbers that 4 bits come in."""
    return make_tiny(tmp_path_factory.mktemp("models") / "wide", width=64)


def make_tiny(folder: Path, width: int = 32) -> Path:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<start>", "<end>", *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<start>", eos_token="<end>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<start>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,  # a frozen head of tiny numbers could say nothing, whatever the adapter does
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def project(tmp_path, tiny, monkeypatch):
    """The current folder, with a recipe r.yaml for a classifier, and its data."""
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path, tiny)
    return tmp_path


def write_project(folder: Path, model: Path) -> None:
    rows = [{"text": f"t {n}", "label": "x" if n % 2 else "y"} for n in range(12)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "r.yaml").write_text(
        f"task: seq_cls\nmodel: {{path: {json.dumps(str(model))}, dtype: fp32}}\n"
        "data: {train: data.jsonl}\ntrain: {steps: 1}\n"
    )


@pytest.fixture
def peft():
    """Run the command in a process of its own: `peft("train", "recipe.yaml", cwd=...)`."""

    def run(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "peft_run", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=cwd,
            env={**os.environ, "LC_ALL": "C.UTF-8", "PYTHONPATH": python_path(), **environment},
        )

    return run


def python_path() -> str:
    return os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
