"""The adapter put into its base: a plain transformers model in a folder, which proves that it is the same model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_run import artefact
from peft_run.console import Console, silent
from peft_run.deploy import probe
from peft_run.errors import RunError, UsageError
from peft_run.files import new_folder, write_json

if TYPE_CHECKING:
    import torch
    from torch import nn

    from peft_run.run import Run

FILE = "merged.json"
TRAINED, ORIGINAL = ONTO = "trained", "original"  # on a quantized base: what its weights stand for, or came from


def merge(
    run: Run, out: Path, console: Console | None = None, *, dtype: str | None = None, onto: str = TRAINED
) -> dict[str, Any]:
    """Write the merged model of a run to the folder `out`; the measures of its proof.

    dtype: fp32, bf16 or fp16; None: that of the run. The merge itself is done and proven in float32; then the written
    copy is read back. onto, for a run on a quantized base: "trained", the float weights that it was trained on, or
    "original", those before quantization, and then the report says how far that is from what was trained ("moved").
    Raises RunError where copies do not agree, UsageError where the method cannot be merged, and leaves nothing at `out`
    then.
    """
    console = console or silent()
    check_free(out)
    with run.working("merge"):
        model, tuned, report = merged(run, onto)
        report |= write(model, tuned, out, dtype)
        run.add_metrics("merge", {"path": str(out), **report})
    effect = f"{report['effect'] or 0:.2g}"
    console("deploy.merged", path=out, difference=f"{report['difference']:.1e}", effect=effect)
    if "moved" in report:
        console("deploy.onto_original", moved=f"{report['moved']:.2g}", effect=effect)
    return report


def merged(run: Run, onto: str = TRAINED) -> tuple[nn.Module, artefact.Tuned, dict[str, Any]]:
    """(the merged float32 model, what it came from, how far it is from the adapted one and that from the base)."""
    tuned, rows, adapted = adapted_logits(run, quantized=onto == TRAINED)
    if not hasattr(tuned.model, "peft_config"):  # all of it was trained
        return tuned.model, tuned, {"difference": 0.0, "effect": None}
    if tuned.model.active_peft_config.is_prompt_learning:
        raise UsageError("deploy.cannot_merge", method=tuned.info["method"])
    with tuned.model.disable_adapter():
        effect = probe.largest_difference(probe.logits(tuned.model, rows), adapted)
    report = {"effect": effect}
    if run.recipe.model.quant is not None:
        report["onto"] = onto
        if onto == ORIGINAL:
            report["moved"] = probe.largest_difference(adapted, adapted_logits(run, quantized=True)[2])
    try:
        model = tuned.model.merge_and_unload(target="dequantized" if report.get("onto") == TRAINED else None)
    except NotImplementedError as error:
        raise UsageError("deploy.cannot_merge", method=tuned.info["method"]) from error
    difference = probe.largest_difference(probe.logits(model, rows), adapted)
    if not difference <= probe.TOLERANCE:
        raise RunError("deploy.not_the_same", difference=f"{difference:.2g}", limit=probe.TOLERANCE)
    return model, tuned, {"difference": difference, **report}


def adapted_logits(run: Run, quantized: bool) -> tuple[artefact.Tuned, list[list[int]], list[torch.Tensor]]:
    """(the run's model in float32, the texts that copies are compared on, its logits for them)."""
    import torch

    from peft_run.precision import compute_exactly

    tuned = artefact.load(run, device="cpu", dtype=torch.float32, quantized=quantized)
    compute_exactly(tuned.model)
    rows = probe.prompts(tuned)
    return tuned, rows, probe.logits(tuned.model, rows)


def write(model: nn.Module, tuned: artefact.Tuned, out: Path, dtype: str | None) -> dict[str, Any]:
    """Write a merged model with all that it needs, and compare what is read back."""
    import transformers

    from peft_run import base

    number_format = base.dtype_named(base.DTYPES[dtype] if dtype else tuned.info["dtype"])
    rows = probe.prompts(tuned)
    cast(model, number_format)
    expected = probe.logits(model, rows)
    tokens = probe.greedy(model, rows, tuned.stop_ids) if model.can_generate() else []
    if tuned.stop_ids and model.generation_config is not None:
        model.generation_config.eos_token_id = tuned.stop_ids
    with new_folder(out) as beside:
        model.save_pretrained(beside)
        tuned.tokenizer.save_pretrained(beside)
        write_json(beside / FILE, {**tuned.info, "dtype": str(number_format).removeprefix("torch.")})
        cls = getattr(transformers, tuned.task.auto_class)
        again = cls.from_pretrained(beside, dtype=number_format).eval()
        difference = probe.largest_difference(probe.logits(again, rows), expected)
        if difference or (tokens and probe.greedy(again, rows, tuned.stop_ids) != tokens):
            raise RunError("deploy.not_the_same", difference=f"{difference:.2g}", limit=0)
    return {"dtype": str(number_format).removeprefix("torch."), "tokens_compared": sum(map(len, tokens))}


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """What a file holds, in another number format. Rotary frequencies and the like stay as they are computed."""
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point() and tensor.dtype != dtype:
            tensor.data = tensor.data.to(dtype)


def check_free(out: Path) -> None:
    """Nobody's folder is overwritten, and what cannot be written is known before the work."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError("deploy.not_empty", path=out)
    parent = next(p for p in [out.parent, *out.parents] if p.exists())
    if not os.access(parent, os.W_OK):
        raise UsageError("deploy.read_only", path=parent)
