"""What other programs load: `export(run, out, to=...)`, one function for each target, each with a self-test."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_run.config.schema import GENERATIVE
from peft_run.console import Console, silent
from peft_run.deploy import probe, vllm
from peft_run.deploy.merge import check_free, merge, merged
from peft_run.deploy.ollama import modelfile
from peft_run.errors import RunError, UsageError
from peft_run.files import new_folder, write_text

if TYPE_CHECKING:
    from torch import nn

    from peft_run.artefact import Tuned
    from peft_run.run import Run

# How far logits of the order of USUAL may move by the file's rounding of the weights; larger ones move further.
LIMITS = {"F16": 0.05, "Q8_0": 1.5}
USUAL = 10


def export(run: Run, out: Path, to: str, console: Console | None = None, *, kind: str = "F16") -> dict[str, Any]:
    """Write a run for another program into the new folder `out`.

    to: hf (a merged transformers model), gguf (a file for llama.cpp), ollama (that, with a Modelfile), vllm (the
    adapter with a start script, or the merged model where vLLM cannot use the adapter). kind: F16 or Q8_0, for GGUF.
    """
    console = console or silent()
    if to == "hf":
        return merge(run, out, console)
    if to == "vllm":
        return vllm.export(run, out, console)
    task = run.recipe.task
    if task not in GENERATIVE:
        raise UsageError("deploy.generative_only", what=to, task=task)
    check_free(out)
    with run.working("export"):
        model, tuned, report = merged(run)
        with new_folder(out) as beside:
            file = beside / f"{run.recipe.output.name}-{kind.lower()}.gguf"
            report |= gguf(model, tuned, file, kind)
            if to == "ollama":
                write_text(beside / "Modelfile", modelfile(tuned, file.name))
        run.add_metrics("export", {"to": to, "path": str(out), **report})
    console("deploy.exported", kind=f"GGUF {kind}", path=out, agreed=report["tokens_agreed"], total=report["tokens"])
    return report


def gguf(model: nn.Module, tuned: Tuned, file: Path, kind: str) -> dict[str, Any]:
    """Write a GGUF file and read it back: tokens, template, logits, and what the model says."""
    import torch

    from peft_run import gguf_write
    from peft_run.gguf_llama import GgufLlama
    from peft_run.packages import require

    require("gguf", extra="run")
    gguf_write.write(model, tuned.tokenizer, tuned.stop_ids, file, kind, tuned.recipe.output.name)
    rows = probe.prompts(tuned)
    read = GgufLlama(file)
    again, tokenizer = read.model(torch.float32).eval(), read.tokenizer()
    for text in probe.TEXTS:
        if tokenizer(text)["input_ids"] != tuned.tokenizer(text, add_special_tokens=False)["input_ids"]:
            raise UsageError("deploy.no_gguf", what="a tokenizer that splits texts in its own way")
    expected = probe.logits(model, rows)
    difference = probe.largest_difference(probe.logits(again, rows), expected)
    limit = LIMITS[kind] * max(1.0, max(row.abs().max().item() for row in expected) / USUAL)
    if tokenizer.chat_template != tuned.tokenizer.chat_template or not difference <= limit:
        raise RunError("deploy.gguf_differs", difference=f"{difference:.2g}", limit=f"{limit:.2g}")
    ours, theirs = (probe.greedy(m, rows, tuned.stop_ids) for m in (again, model))
    agreed, total = probe.same_words(ours, theirs)
    return {"file": file.name, "file_difference": difference, "tokens_agreed": agreed, "tokens": total}
