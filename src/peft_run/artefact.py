"""What a finished run holds besides the adapter, and how the tuned model is loaded from it.

artefact.json says what the model was trained to read: task, labels, stop tokens, base model, and the hashes of the
tokenizer and the chat template, which are files beside it. `load` refuses where one of them has changed since.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft.storage import provenance
from peft_run import base, tasks
from peft_run.config.schema import HEADS
from peft_run.data.render import Renderer
from peft_run.errors import RunError
from peft_run.files import write_bytes
from peft_run.run import Run
from peft_run.train.adapter import FULL, answer_task_ids
from peft_run.train.adapter import settle as settle_for_method

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from peft_run.config import Recipe
    from peft_run.tasks.task import Task

FILE = "artefact.json"
FORMAT = 1


@dataclass
class Tuned:
    """A tuned model with all that belongs to it. `with tuned.model.disable_adapter():` is the base model."""

    run: Run
    recipe: Recipe
    model: nn.Module  # a PeftModel in eval mode; a plain model after adapter.method=full
    tokenizer: PreTrainedTokenizerBase  # with the chat template
    renderer: Renderer  # renderer.prompt(messages) are the tokens to generate from
    task: Task  # task.encode_all(samples), task.collate(items), task.score(model, batch)
    labels: list[str]
    stop_ids: list[int]
    info: dict[str, Any]  # artefact.json

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def save(
    run: Run,
    recipe: Recipe,
    model: nn.Module,
    task: Task,
    dtype: torch.dtype,
    step: int,
    described: bytes | None = None,
) -> dict[str, Any]:
    """Write the result to the run's root, where upstream's PeftModel.from_pretrained finds it too.

    described: what `describe_base` said, where the base cannot be read any more.
    """
    renderer = task.renderer
    is_adapter = hasattr(model, "peft_config")
    if is_adapter and not os.path.isdir(base.find(recipe)):
        for config in model.peft_config.values():
            config.base_model_name_or_path, config.revision = recipe.model.path, recipe.model.revision
    model.save_pretrained(run.path)
    if described is not None:
        write_bytes(run / provenance.FILE_NAME, described)
    renderer.tokenizer.save_pretrained(run.path)
    info = {
        "format": FORMAT,
        "task": recipe.task,
        "method": recipe.adapter.method.upper(),
        "base": recipe.model.path,
        "base_config": fingerprint(model),
        "dtype": str(dtype).removeprefix("torch."),
        "step": step,
        "labels": task.labels,
        "system": recipe.data.system,
        "prompt": recipe.data.prompt,
        "max_length": recipe.data.max_length,
        "stop_ids": renderer.stop_ids() if recipe.task not in HEADS else [],
        "template_sha256": renderer.template_sha256(),
        "tokenizer_sha256": renderer.tokenizer_sha256(),
    }
    run.write_json(FILE, info)
    return info


def describe_base(model: nn.Module) -> bytes | None:
    """The base's provenance file. Once the base is sharded, no process can read it alone."""
    if not hasattr(model, "peft_config") or model.active_peft_config.is_prompt_learning:
        return None
    return provenance.describe(model.get_base_model(), model.base_model.layers, "default")


def load(
    run: Run | str | os.PathLike,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    base_path: str | None = None,
    quantized: bool = True,
) -> Tuned:
    """The tuned model of a finished run. Base, device and number format are those of the run unless given.

    quantized=False: on the base before quantization.
    """
    import transformers

    from peft import PeftModel

    run = run if isinstance(run, Run) else Run.open(run)
    info = run.read_json(FILE)
    if info is None:
        raise RunError("artefact.unfinished", path=run.path)
    recipe = run.recipe
    if base_path is not None:
        recipe.model.path = os.path.abspath(base_path) if os.path.isdir(base_path) else base_path
    if device is not None:
        recipe.model.device = device
    if not quantized:
        recipe.model.quant = None
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(run.path), padding_side="right")
    renderer = Renderer(tokenizer)
    check_same(renderer, info, run)
    task = tasks.make(recipe, renderer, info["labels"])
    dtype = dtype or base.dtype_named(info["dtype"])
    if info["method"] == FULL:
        cls = getattr(transformers, task.auto_class)
        model = cls.from_pretrained(str(run.path), dtype=dtype).to(base.device_of(recipe))
    else:
        plain = base.load_base(recipe, task.auto_class, dtype, **task.model_settings())
        settle(plain, tokenizer)
        settle_for_method(plain, recipe)
        with warnings.catch_warnings():
            if not quantized:  # asked for; `peft merge` says what it makes of the model
                warnings.filterwarnings("ignore", message=".* was trained on a base stored as")
            model = PeftModel.from_pretrained(plain, str(run.path), strict=True)
        answer_task_ids(model)
    model.eval()
    task.prepare(model)
    return Tuned(run, recipe, model, tokenizer, renderer, task, info["labels"], info["stop_ids"], info)


def check_same(renderer: Renderer, info: dict[str, Any], run: Run) -> None:
    """The files beside the adapter must be those it was trained with."""
    for name, now in (("template", renderer.template_sha256()), ("tokenizer", renderer.tokenizer_sha256())):
        if info[f"{name}_sha256"] != now:
            raise RunError(f"artefact.{name}_changed", path=run.path)


def settle(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Models that look for the last token of a text need to know what padding is."""
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Enough of the base's config to tell it from another."""
    config = model.config
    names = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    return {name: getattr(config, name, None) for name in names}
