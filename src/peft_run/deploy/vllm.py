"""For vLLM: the adapter with a start script, or the merged model where vLLM cannot serve the adapter."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_run.deploy.merge import check_free, merge
from peft_run.errors import UsageError
from peft_run.files import new_folder, read_json, write_text

if TYPE_CHECKING:
    from peft_run.console import Console
    from peft_run.run import Run

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes


def export(run: Run, out: Path, console: Console) -> dict[str, Any]:
    """Write the adapter and serve.sh, or, with the reason, a merged model and serve.sh."""
    if run.recipe.task != "causal_lm":
        raise UsageError("deploy.generative_only", what="vllm", task=run.recipe.task)
    check_free(out)
    config = adapter_config(run)
    reason = "quantized base" if run.recipe.model.quant else obstacle(config)
    name = run.recipe.output.name
    if reason is not None:
        console("deploy.merged_for_vllm", reason=reason)
        report = merge(run, out, console)
        write_script(out, ["vllm", "serve", ".", "--served-model-name", name])
        return {**report, "form": "merged"}
    base = config["base_model_name_or_path"]
    rank = next(r for r in RANKS if r >= largest_rank(config))
    with run.working("export"), new_folder(out) as beside:
        folder = beside / name
        folder.mkdir()
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            shutil.copy2(run / file, folder / file)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
            if (run / file).exists():
                shutil.copy2(run / file, beside / file)
        command = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(rank)]
        command += ["--lora-modules", f"{name}={name}", "--tokenizer", "."]
        write_script(beside, command)
        run.add_metrics("export", {"to": "vllm", "path": str(out), "form": "adapter"})
    console("deploy.adapter_for_vllm", path=out)
    return {"form": "adapter", "max_lora_rank": rank, "base": base}


def adapter_config(run: Run) -> dict[str, Any]:
    file = run / "adapter_config.json"
    return read_json(file) if file.is_file() else {"peft_type": "FULL"}


def obstacle(config: dict[str, Any]) -> str | None:
    """Why vLLM cannot serve the adapter beside its base, in a few words; None where it can."""
    if config["peft_type"] != "LORA":
        return f"peft_type={config['peft_type']}"
    for field in ("use_dora", "modules_to_save", "trainable_token_indices", "alora_invocation_tokens", "arrow_config"):
        if config.get(field):
            return field
    if config.get("bias", "none") != "none":
        return f"bias={config['bias']}"
    return None if largest_rank(config) <= RANKS[-1] else f"r={largest_rank(config)}"


def largest_rank(config: dict[str, Any]) -> int:
    return max([config["r"], *(config.get("rank_pattern") or {}).values()])


def write_script(folder: Path, command: list[str]) -> None:
    """serve.sh, which works wherever the folder is put."""
    script = folder / "serve.sh"
    write_text(script, f'#!/bin/sh\ncd "$(dirname "$0")" && exec {shlex.join(command)} "$@"\n')
    script.chmod(0o755)
