"""The base model with the recipe's adapter on it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from peft_run.config import Recipe
from peft_run.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from peft import PeftConfig

FULL = "FULL"
HEADS = {"score", "classifier", "qa_outputs", "lm_head", "classification_head"}
LORA_RANK = 16
VIRTUAL_TOKENS = 16

# Where the methods' own configs keep what the recipe calls by one name, first found first.
FIELDS = {
    "r": ("r", "rank", "num_virtual_tokens", "adapter_len"),
    "alpha": ("lora_alpha", "alpha"),
    "dropout": ("lora_dropout", "dropout", "module_dropout"),
}


def wrap(base: nn.Module, recipe: Recipe, task_type: str, steps: int) -> nn.Module:
    """The model to train. Every trained parameter is float32, whatever the base is."""
    from peft import get_peft_model, prepare_model_for_kbit_training

    if recipe.adapter.method.upper() == FULL:
        if recipe.model.quant is not None:
            raise UsageError("adapter.full_quantized")
        base.requires_grad_(True)
        return base
    if recipe.model.quant is not None:
        if recipe.model.quant.loftq and (recipe.adapter.method.lower() != "lora" or recipe.task in ("dpo", "kto")):
            raise UsageError("adapter.loftq", method=recipe.adapter.method, task=recipe.task)
        prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    settle(base, recipe)
    model = get_peft_model(base, adapter_config(recipe, task_type, steps))
    keep_masters(model)
    answer_task_ids(model)
    return model


def settle(base: nn.Module, recipe: Recipe) -> None:
    """What a method needs of the base before it is wrapped or loaded."""
    if recipe.adapter.method.upper() == "XLORA":  # it weighs its experts anew in every call
        base.config.use_cache = False


def answer_task_ids(model: nn.Module) -> None:
    """Poly and multitask prompts ask which task a sample is of; a recipe has one."""
    import torch

    if not any(config.peft_type in ("POLY", "MULTITASK_PROMPT_TUNING") for config in model.peft_config.values()):
        return

    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids = kwargs.get("input_ids")
        if kwargs.get("task_ids") is None and ids is not None:
            kwargs["task_ids"] = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
        return args, kwargs

    model.register_forward_pre_hook(add, with_kwargs=True)


def adapter_config(recipe: Recipe, task_type: str, steps: int) -> PeftConfig:
    """The config of the method. Raises UsageError naming a field that the method does not have."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    adapter = recipe.adapter
    name = adapter.method.upper().replace("-", "_")
    if name not in PEFT_TYPE_TO_CONFIG_MAPPING:
        import difflib

        known = sorted(PEFT_TYPE_TO_CONFIG_MAPPING)
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
        raise UsageError("adapter.no_method", method=adapter.method, nearest=(near or ["LORA"])[0].lower())
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[name]
    fields = {field.name for field in dataclasses.fields(cls)}
    settings: dict[str, Any] = {"task_type": task_type}
    for ours, theirs in FIELDS.items():
        value = getattr(adapter, ours)
        if value is None:
            continue
        field = next((field for field in theirs if field in fields), None)
        if field is None:
            raise UsageError("adapter.no_field", method=name, field=ours)
        settings[field] = int(value) if ours == "alpha" and float(value).is_integer() else value
    if name == "LORA":
        settings.setdefault("r", LORA_RANK)
        settings.setdefault("lora_alpha", 2 * settings["r"])
    if "num_virtual_tokens" in fields and "cpt_token_ids" not in fields:
        settings.setdefault("num_virtual_tokens", VIRTUAL_TOKENS)
    if adapter.target != "auto":
        if "target_modules" not in fields:
            raise UsageError("adapter.no_field", method=name, field="target")
        settings["target_modules"] = adapter.target
    elif name == "LORA":
        settings["target_modules"] = "all-linear"
    if adapter.modules_to_save:
        settings["modules_to_save"] = adapter.modules_to_save
    if "total_step" in fields:  # a method with a schedule
        settings["total_step"] = steps
    if unknown := set(adapter.options) - fields:
        import difflib

        wrong = sorted(unknown)[0]
        near = difflib.get_close_matches(wrong, fields, n=1, cutoff=0.4)
        raise UsageError("adapter.no_option", method=name, field=wrong, nearest=(near or sorted(fields))[0])
    return cls(**{**settings, **adapter.options})


def keep_masters(model: nn.Module) -> None:
    """Modules trained whole were copied in the base's half precision, in which small steps would round to nothing."""
    import torch

    for name, module in list(model.named_modules()):
        half = [
            p
            for p in module.parameters(recurse=False)
            if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)
        ]
        if not half:
            continue
        dtype = half[0].dtype
        for parameter in half:
            parameter.data = parameter.data.float()
        module.register_forward_pre_hook(to_float)
        if not HEADS & set(name.split(".")):  # a head's result is the model's; others feed layers in the base's format
            module.register_forward_hook(lambda module, inputs, output, dtype=dtype: output.to(dtype))


def to_float(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    import torch

    return tuple(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)


def trained(model: nn.Module) -> dict[str, torch.nn.Parameter]:
    """name -> parameter, of those that are trained."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
