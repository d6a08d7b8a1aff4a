"""The base model and its tokenizer: found, and loaded in the right number format on the right device."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_run import kept
from peft_run.config import Recipe
from peft_run.errors import RunError, UsageError
from peft_run.packages import require

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # the recipe's names -> torch's
PACKAGED = "smollm2-135m-instruct"  # the one base model that a package brings: see models.py


def find(recipe: Recipe) -> str:
    """A folder of this machine, or a hub id. Raises UsageError where the name can be neither."""
    path = recipe.model.path
    if not path:
        raise UsageError("base.none")
    assets = os.environ.get("PEFT_ASSETS")
    for folder in (recipe.at(path), Path(assets, path) if assets else None):
        if folder is not None and folder.is_dir():
            if not (folder / "config.json").is_file():
                raise UsageError("base.no_model", path=folder)
            return str(folder)
    if path.lower() == PACKAGED:
        from peft_run.models import smollm2

        return str(smollm2())
    if path.startswith((".", "/", "~")) or not HUB_ID.fullmatch(path):
        raise UsageError("base.not_found", path=path)
    return path


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """A fast tokenizer with a padding token; where the model names none, its end token pads."""
    require("transformers", extra="run")
    from transformers import AutoTokenizer

    where = str(recipe.at(recipe.model.tokenizer)) if recipe.model.tokenizer else find(recipe)
    tokenizer = fetch(AutoTokenizer, where, recipe, padding_side="right")
    if not tokenizer.is_fast:
        raise UsageError("base.slow_tokenizer", path=where)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UsageError("base.no_end_token", path=where)
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(recipe: Recipe, auto_class: str, dtype: torch.dtype, **settings: Any) -> PreTrainedModel:
    """The base model with the output layer of the task (`auto_class`), on the recipe's device."""
    if kept.keeper is None or recipe.model.quant is not None or recipe.adapter.method.upper() == "FULL":
        return read_base(recipe, auto_class, dtype, **settings)
    key = (repr(recipe.model.model_copy(update={"path": find(recipe)})), auto_class, dtype, repr(settings))
    return kept.keeper.take(key, lambda: read_base(recipe, auto_class, dtype, **settings))


def read_base(recipe: Recipe, auto_class: str, dtype: torch.dtype, **settings: Any) -> PreTrainedModel:
    import transformers

    import peft

    where, model = find(recipe), recipe.model
    if model.quant is not None:
        settings["quantization_config"] = quantization(recipe, dtype)
    if model.attn != "auto":
        settings["attn_implementation"] = model.attn
    loaded, missing = read(getattr(transformers, auto_class), where, recipe, dtype=dtype, **settings)
    if missing:  # heads of some models seek the body under another name than files have, and start it at random
        body, missing = read(transformers.AutoModel, where, recipe, dtype=dtype, **settings)
        if missing or type(body) is not type(loaded.base_model):
            raise UsageError("base.missing", path=where, model=type(loaded).__name__, key=min(missing, default="-"))
        setattr(loaded, loaded.base_model_prefix, body)
    if model.quant is None:
        loaded = loaded.to(device_of(recipe))
    peft.use_onednn(loaded)
    return loaded


def read(cls: Any, where: str, recipe: Recipe, **settings: Any) -> tuple[PreTrainedModel, list[str]]:
    """A model, and which weights of its body the files lack. A new head, or a pooler below it, is trained anyway."""
    model, info = fetch(cls, where, recipe, output_loading_info=True, **settings)
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    inner = {f"{prefix}{name}" for name, _ in model.base_model.named_parameters()}
    return model, sorted(key for key in info["missing_keys"] if key in inner and "pooler" not in key)


def fetch(cls: Any, where: str, recipe: Recipe, **settings: Any) -> Any:
    """`cls.from_pretrained`, with errors that say what to do."""
    quietly()
    try:
        return cls.from_pretrained(
            where,
            revision=recipe.model.revision or "main",
            trust_remote_code=recipe.model.trust_remote_code,
            **settings,
        )
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, OSError) and not Path(where).is_dir():
            raise UsageError("base.not_here", path=where) from error
        raise UsageError("base.broken", path=where, problem=" ".join(str(error).split())[:300]) from error


def quietly() -> None:
    """Load reports and bars of the libraries would drown our lines; what matters in them is checked here."""
    import logging as standard

    from transformers.utils import logging

    # They talk of kernels that they do without, the last one at every product in 8 bits of something else than float16.
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes.autograd._functions"):
        standard.getLogger(name).setLevel(standard.ERROR)

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def quantization(recipe: Recipe, dtype: torch.dtype) -> Any:
    require("bitsandbytes", extra="quant")
    from transformers import BitsAndBytesConfig

    quant = recipe.model.quant
    if quant.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant.type,
        bnb_4bit_use_double_quant=quant.double,
        bnb_4bit_compute_dtype=dtype,
    )


def device_of(recipe: Recipe) -> torch.device:
    import torch

    name = recipe.model.device
    if name == "auto":
        mps = getattr(torch.backends, "mps", None)
        name = "cuda" if torch.cuda.is_available() else "mps" if mps and mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError("base.no_device", device=name) from error
    return device


def dtype_of(recipe: Recipe, device: torch.device) -> torch.dtype:
    """The base's number format. fp16 is for GPUs: CPUs multiply it slowly or not at all."""
    import torch

    asked = recipe.model.dtype
    if asked == "fp16" and device.type == "cpu":
        raise UsageError("base.fp16_on_cpu")
    if asked == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        if device.type == "cpu":
            from peft_run.precision import fastest_precision

            return fastest_precision().dtype
        return torch.float32
    return dtype_named(DTYPES[asked])


def dtype_named(name: str) -> torch.dtype:
    """The inverse of `str(dtype)`, for files."""
    import torch

    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise RunError("base.unknown_dtype", dtype=name)
    return dtype
