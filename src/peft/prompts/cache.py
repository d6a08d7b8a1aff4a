"""Prefixes as caches of transformers: filled ones, and fixed ones that survive gradient checkpointing."""

import contextlib
import inspect
from functools import partial

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer

from peft.errors import AdapterError
from peft.prompts.insert import CACHE_NAMES
from peft.prompts.sizes import by_layer, is_encoder_decoder, text_config


def name_of(base):
    """The argument by which a model, or the one inside it, takes a cache. Raises ValueError where it takes none."""
    backbone = getattr(base, getattr(base, "base_model_prefix", ""), base)
    for model in (base, backbone):
        parameters = inspect.signature(model.forward).parameters
        if (name := next((n for n in CACHE_NAMES if n in parameters), None)) is not None:
            return name
    raise ValueError(
        f"Model does not support past key values which are required for prefix tuning: {type(base).__name__}.forward "
        f"takes none of {', '.join(CACHE_NAMES)}. Use prompt tuning or LoRA."
    )


def states(base, encoder, table, layer, batch_size):
    """(keys, values) of one layer, as wide as its attention has them."""
    pair = encoder.key_values(table.to(base.dtype), layer, batch_size)
    widths = by_layer(text_config(base), "head_dim")
    return pair if len(set(widths)) == 1 else tuple(t[..., : widths[layer]] for t in pair)


def filled(base, encoder, batch_size, cache=None):
    """A cache that begins with the prefix: `cache`, if given, which must be empty, else a new one."""
    if cache is None:
        config = base.get_decoder().config if is_encoder_decoder(base) else base.config
        cache = DynamicCache(config=config)
        if is_encoder_decoder(base):
            cache = EncoderDecoderCache(cache, DynamicCache(config=config))
    into = getattr(cache, "self_attention_cache", cache)
    if into.is_compileable:
        raise AdapterError(
            "A prefix needs a cache that can grow; this one, a static cache, has no room for the virtual tokens. "
            "Leave out cache_implementation='static'."
        )
    table = encoder.table()
    for i in range(encoder.layers):
        # layers that share the keys of another, and linear attention, hold none of their own
        if i >= len(into.layers) or isinstance(into.layers[i], DynamicLayer):
            into.update(*states(base, encoder, table, i, batch_size), i)
    return cache


class FixedLayer(DynamicLayer):
    """Puts keys and values in front of those of each forward and keeps none, so that recomputing reads the same.

    make: gives (keys, values), or None for nothing. It is called in each forward, so that re-entrant checkpointing,
    which runs each layer's backward by itself, has a graph of its own for each.
    """

    def __init__(self, make, length):
        super().__init__()
        self.make, self.length, self.is_initialized, self.was_read = make, length, True, False

    def update(self, key_states, value_states, *args, **kwargs):
        self.was_read = True
        if self.make is None:
            return key_states, value_states
        keys, values = self.make()
        return torch.cat([keys.to(key_states), key_states], -2), torch.cat([values.to(value_states), value_states], -2)

    def get_seq_length(self):
        return self.length


class _NeverUpdated(dict):
    """Cross-attention writes here that its cache is filled; a fixed one never is."""

    def __setitem__(self, key, value):
        pass


def fixed(base, encoder, batch_size, cache=None):
    """A cache that is the prefix before and after a forward; an empty `cache` would only be filled, so it is left."""
    length = len(encoder.table())
    makers = [partial(_layer_states, base, encoder, batch_size, i) for i in range(encoder.layers)]
    prefix = Cache(layers=[FixedLayer(make, length) for make in makers])
    if is_encoder_decoder(base):
        prefix = EncoderDecoderCache(prefix, Cache(layers=[FixedLayer(None, 0) for _ in makers]))
        prefix.is_updated = _NeverUpdated()
    return prefix


def _layer_states(base, encoder, batch_size, layer):
    return states(base, encoder, encoder.table(), layer, batch_size)


def check_read(cache, length):
    """Raise where a forward has ignored the prefix."""
    layers = getattr(cache, "self_attention_cache", cache).layers
    if not any(getattr(layer, "was_read", layer.get_seq_length() > length) for layer in layers):
        raise AdapterError(
            "The model's attention did not read the prefix, so it would have no effect: the model drops its cache in "
            "this mode. Call model.gradient_checkpointing_disable(), or use prompt tuning or LoRA."
        )


# -- gradient checkpointing --------------------------------------------------------------------------------------
def checkpointed_layers(base):
    """Layers that will recompute in backward, as [(layer, position of its cache argument, name of it)]."""
    if not (base.training and torch.is_grad_enabled()):
        return []
    found = []
    for layer in (base.get_decoder() if is_encoder_decoder(base) else base).modules():
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing and layer.training:
            parameters = list(inspect.signature(type(layer).forward).parameters)
            name = next((n for n in (*CACHE_NAMES, "layer_past") if n in parameters), None)
            if name is not None:
                found.append((layer, parameters.index(name) - 1, name))
    return found


@contextlib.contextmanager
def through_checkpoints(layers, cache):
    """While inside, these layers get `cache`, which transformers takes away from layers that checkpoint.

    It does so because a cache that is written to would be written twice; a fixed one is only read.
    """
    before = [layer._gradient_checkpointing_func for layer, _, _ in layers]
    for (layer, position, name), func in zip(layers, before):
        layer._gradient_checkpointing_func = partial(_with_cache, func, position, name, cache)
    try:
        yield
    finally:
        for (layer, _, _), func in zip(layers, before):
            layer._gradient_checkpointing_func = func


def _with_cache(checkpoint, position, name, cache, forward, hidden_states, *args):
    args = [hidden_states, *args]
    if not hidden_states.requires_grad:  # re-entrant checkpointing passes gradients on only if an input needs one
        args[0] = hidden_states.detach().requires_grad_()
    if position < len(args):
        args[position] = cache
    else:
        forward = partial(forward, **{name: cache})
    return checkpoint(forward, *args)
