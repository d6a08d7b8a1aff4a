"""layer_replication: a deeper decoder from a model's own layers, whose copies share weights (arXiv 2312.15166)."""

import copy

from torch import nn

from peft.core.layer import AdapterLayer
from peft.errors import AdapterError, ConfigError


def replicate_layers(model, layer_map):
    """Rebuild a decoder from spans [start, end) of its layers, in place. A layer that comes again is a new module with
    the very same parameters, so that it can have adapters of its own.

    Layers are found as `.model.layers` (Llama and most others), `.encoder.layer` (BERT) or `.h` (Falcon). Raises
    ValueError where there are none, a span lies outside of them, or they have adapters already. Does nothing if the
    layers were made by this very layer_map.
    """
    owner, name = _find(model)
    layers = getattr(owner, name)
    spans = [(start, end) for start, end in layer_map]
    if getattr(layers, "layer_map", None) == spans:
        return
    if any(isinstance(m, AdapterLayer) for m in layers.modules()):
        raise AdapterError(
            "layer_replication changes the base model, so all its adapters must be made for the same one: "
            f"{spans} is asked for, but the layers already have adapters. Start from a fresh base model."
        )
    if not spans or any(not 0 <= start < end <= len(layers) for start, end in spans):
        raise ConfigError(
            f"layer_replication must list spans (start, end) with 0 <= start < end <= {len(layers)}, got {layer_map}."
        )
    order = [i for start, end in spans for i in range(start, end)]
    rebuilt, used = nn.ModuleList(), set()
    for position, i in enumerate(order):
        layer = _shared_copy(layers[i]) if i in used else layers[i]
        used.add(i)
        for module in layer.modules():
            if "layer_idx" in module.__dict__:  # where its keys and values lie in the cache
                module.layer_idx = position
        rebuilt.append(layer)
    rebuilt.layer_map = spans
    setattr(owner, name, rebuilt)
    for config in {id(m.config): m.config for m in (model, owner) if hasattr(m, "config")}.values():
        _resize(config, order, len(layers))


def _find(model):
    """(module, attribute) of the list of decoder layers."""
    inner = model
    while hasattr(inner, "model"):
        inner = inner.model
    for candidate in (inner, getattr(inner, getattr(inner, "base_model_prefix", None) or "model", inner)):
        if hasattr(candidate, "layers"):
            return candidate, "layers"
        if hasattr(getattr(candidate, "encoder", None), "layer"):
            return candidate.encoder, "layer"
        if hasattr(candidate, "h"):
            return candidate, "h"
    raise ConfigError(
        "Could not locate the layers attribute in the model. Expected Llama, Bert or Falcon compatible architectures, "
        f"got {type(model).__name__}."
    )


def _shared_copy(layer):
    """A copy of all modules that holds the same parameters, buffers and configs."""
    memo = {id(t): t for t in [*layer.parameters(), *layer.buffers()]}
    memo |= {id(m.config): m.config for m in layer.modules() if "config" in m.__dict__}
    return copy.deepcopy(layer, memo)


def _resize(config, order, before):
    """Let a model's config tell of the new layers."""
    if hasattr(config, "num_hidden_layers"):
        config.num_hidden_layers = len(order)
    if (types := getattr(config, "layer_types", None)) and len(types) == before:  # caches are made after it
        config.layer_types = [types[i] for i in order]
