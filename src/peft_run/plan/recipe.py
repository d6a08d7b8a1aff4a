"""A recipe's plan: the base by its config, the adapter and the loss by the road's own code."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from peft_run import base, tasks
from peft_run.config.schema import Quant
from peft_run.plan.batches import Batches

if TYPE_CHECKING:
    from peft import Plan
    from peft_run.config import Recipe

TIGHT = 0.85  # of the room: what a plan is wrong by may lie above


def plan(recipe: Recipe, batches: Batches) -> Plan:
    """The memory that `peft train` would take for the recipe, beside what the process has already."""
    import torch
    import transformers

    import peft
    from peft_run.train import adapter

    module, _, name = tasks.HOMES[recipe.task].partition(".")
    task = batches.task or getattr(importlib.import_module(f"peft_run.tasks.{module}"), name)
    device = base.device_of(recipe)
    full = recipe.adapter.method.upper() == adapter.FULL
    dtype = torch.float32 if full else base.dtype_of(recipe, device)
    config = base.fetch(transformers.AutoConfig, base.find(recipe), recipe)
    for setting, value in task.model_settings().items() if batches.task is not None else ():
        setattr(config, setting, value)
    if recipe.model.attn != "auto":
        config._attn_implementation = recipe.model.attn
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is said of the real model is said when that is made
        empty = getattr(transformers, task.auto_class).from_config(config, dtype=dtype)
        loss, prepared = None, []

        def task_loss(model: Any, batch: Any) -> Any:
            if not prepared:
                task.prepare(model)
                prepared.append(model)
            return task.loss(model, batch)

        if batches.task is not None:
            loss = task_loss
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.plan(
            empty,
            batch=recipe.train.batch,
            length=batches.length,
            quantization=storage(recipe),
            optimizer="adamw_fused" if recipe.train.optimizer == "adamw" else recipe.train.optimizer,
            gradient_checkpointing=recipe.train.grad_checkpoint,
            accumulate=recipe.train.accumulate,
            eval_batch=recipe.eval.batch if batches.evaluated else 0,
            device=device,
            inputs=batches.make,
            loss=loss,
            wrap=lambda model: adapter.wrap(model, recipe, task.peft_type, steps(recipe, batches) or 1),
        )


def storage(recipe: Recipe) -> str | None:
    quant = recipe.model.quant
    if quant is None:
        return None
    return "int8" if quant.bits == 8 else quant.type + ("_double" if quant.double else "")


def steps(recipe: Recipe, batches: Batches) -> int | None:
    """Of the whole training; None where nothing says how many samples there are."""
    from peft_run.train.loop import total_steps

    if batches.samples is None:
        return recipe.train.steps
    train = recipe.train
    return total_steps(recipe, math.ceil(math.ceil(batches.samples / train.batch) / train.accumulate))


def changed(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """A copy with other values: {"train.batch": 2}."""
    copy = recipe.model_copy(deep=True)
    for name, value in changes.items():
        section, field = name.split(".")
        setattr(getattr(copy, section), field, value)
    return copy


def variants(recipe: Recipe) -> dict[str, Recipe]:
    """The recipe's method beside full fine-tuning, and on a quantized base."""
    method = recipe.adapter.method.lower()
    adapted = changed(recipe, {"adapter.method": "lora" if method == "full" else method, "model.quant": None})
    found = {"full": changed(recipe, {"adapter.method": "full", "model.quant": None}), adapted.adapter.method: adapted}
    for bits in (8, 4):
        quant = recipe.model.quant if recipe.model.quant and recipe.model.quant.bits == bits else Quant(bits=bits)
        found[f"{adapted.adapter.method} {bits} bit"] = changed(adapted, {"model.quant": quant})
    return found


def own(recipe: Recipe) -> str:
    """The name of the recipe itself among its variants."""
    method = recipe.adapter.method.lower()
    return method if recipe.model.quant is None or method == "full" else f"{method} {recipe.model.quant.bits} bit"


def verdict(peak: int, room: int) -> str:
    return "exceeds" if peak > room else "tight" if peak > TIGHT * room else "fits"


def remedies(recipe: Recipe, batches: Batches, room: int) -> Iterator[tuple[str, Plan]]:
    """Changes that make the recipe fit, those first that change least of what is learnt, as (overrides, plan)."""
    checkpoint = {"train.grad_checkpoint": True}
    tried: list[dict[str, Any]] = [checkpoint, smaller(recipe, recipe.train.batch // 2), smaller(recipe, 1)]
    tried.append({**checkpoint, **smaller(recipe, 1)})
    if recipe.adapter.method.lower() == "full":
        tried += [{"adapter.method": "lora"}, {"adapter.method": "lora", **checkpoint, **smaller(recipe, 1)}]
    lora = {"adapter.method": "lora"} if recipe.adapter.method.lower() == "full" else {}
    for bits in (8, 4):
        tried += [
            {**lora, "model.quant": Quant(bits=bits)},
            {**lora, "model.quant": Quant(bits=bits), **checkpoint, **smaller(recipe, 1)},
        ]
    seen = set()
    for changes in tried:
        text = overrides(changes)
        if text in seen or changed(recipe, changes) == recipe:
            continue
        seen.add(text)
        found = plan(changed(recipe, changes), batches)
        if found.peak <= room:
            yield text, found


def smaller(recipe: Recipe, batch: int) -> dict[str, Any]:
    """A smaller batch, and as many samples for a step as before."""
    batch = max(1, batch)
    return {"train.batch": batch, "train.accumulate": recipe.train.accumulate * -(-recipe.train.batch // batch)}


def overrides(changes: dict[str, Any]) -> str:
    """As they are written on the command line."""

    def shown(name: str, value: Any) -> str:
        if isinstance(value, Quant):
            return f"{name}.bits={value.bits}"
        return f"{name}={str(value).lower()}"

    return " ".join(shown(name, value) for name, value in changes.items())
