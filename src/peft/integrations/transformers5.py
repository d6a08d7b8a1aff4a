"""transformers' loader and adapter files: how a file's keys become the keys of a model with injected adapters."""

import re

from transformers.core_model_loading import WeightConverter, WeightRenaming

from peft import registry
from peft.core import match
from peft.errors import ConfigError


def build_peft_weight_mapping(weight_conversions, adapter_name, peft_config=None):
    """The conversions with which transformers loads the file of an adapter that it has just injected.

    weight_conversions: those of the base model; its renamings hold for adapters too, while fusing weights does not
    reach A and B. peft_config: None takes every method's prefix. Raises ConfigError where the adapter was trained on
    layers that this version of transformers fuses into one parameter.
    """
    given = list(weight_conversions or ())
    if peft_config is not None:
        for conversion in given:
            if isinstance(conversion, WeightConverter):
                _check_not_fused(conversion, peft_config)
    methods = [registry.method(t) for t in (registry.names() if peft_config is None else [peft_config.peft_type])]
    mapping = [WeightRenaming("base_model.model.model.", "model."), WeightRenaming("base_model.model.", "")]
    for prefix in sorted({m.prefix for m in methods if m.prefix}):
        mapping.append(WeightRenaming(rf"({prefix}[^\.]*)", rf"\1.{adapter_name}"))
    for field, rest in sorted({pair for m in methods for pair in _shortened(m)}):
        mapping.append(WeightRenaming(rf"({field}\.{re.escape(adapter_name)})$", rf"\1.{rest}"))
    return mapping + [c for c in given if not isinstance(c, WeightConverter)]


def _shortened(method):
    """(field, rest) of the keys that files spell without their last part: lora_magnitude_vector.<adapter>.weight."""
    renames = method.tuner.layer_cls.adapter_cls.renames if method.tuner is not None else {}
    return [(filed, live.removeprefix(f"{filed}.")) for live, filed in renames.items() if live.startswith(f"{filed}.")]


def _check_not_fused(conversion, config):
    """Raise where the config targets experts' layers, which `conversion` makes a single parameter of."""
    targets = getattr(config, "target_modules", None)
    if not targets or targets == match.ALL_LINEAR:
        return
    names = match.Names(targets)
    for pattern in conversion.source_patterns:
        expert = pattern.replace("*", "0").removesuffix(".weight").lstrip("^.")
        parts = expert.split(".")
        hit = "*" in pattern and next((n for i in range(len(parts)) if (n := names.match(".".join(parts[i:])))), None)
        if hit:
            fused = conversion.target_patterns[0].rpartition(".")[2]
            raise ConfigError(
                f"The adapter targets {hit!r}, one layer for each expert. transformers keeps them all in one "
                f"parameter, {fused!r}, so the adapter does not fit the model. Train one with "
                f"target_parameters=[{fused!r}], or load this one with transformers 4."
            )
