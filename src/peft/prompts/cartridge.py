"""Cartridge: a key/value cache as the adapter, its first tokens frozen (arXiv 2506.06266); and how to start one."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from peft.config import PeftConfig, PromptLearningConfig
from peft.enums import PeftType
from peft.errors import AdapterError, AdapterMismatchError, ConfigError
from peft.prompts.prefix import CacheEncoder
from peft.registry import register

LAYOUT = ("task_type", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")


@dataclass
class CartridgeConfig(PromptLearningConfig):
    """Cartridge. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.CARTRIDGE

    num_frozen_tokens: int = field(
        default=1, metadata={"help": "first tokens that are not trained; attention leans on the very first"}
    )

    def __post_init__(self):
        super().__post_init__()
        most = self.num_virtual_tokens
        if self.num_frozen_tokens < 0 or (most is not None and self.num_frozen_tokens > most):
            raise ConfigError(
                f"CartridgeConfig.num_frozen_tokens must be between 0 and num_virtual_tokens={most}, "
                f"got {self.num_frozen_tokens}."
            )


class CartridgeEncoder(CacheEncoder):
    """Keys and values as they are, read like a prefix's.

    frozen_embedding     (frozen tokens, layers * 2 * token_dim), or None
    trainable_embedding  (other tokens, layers * 2 * token_dim)
    """

    frozen = ("frozen_embedding",)

    def __init__(self, config):
        super().__init__(config)
        fixed, width = config.num_frozen_tokens, config.num_layers * 2 * config.token_dim
        self.frozen_embedding = nn.Parameter(torch.randn(fixed, width), requires_grad=False) if fixed else None
        self.trainable_embedding = nn.Parameter(torch.randn(config.num_virtual_tokens - fixed, width))

    def table(self):
        if self.frozen_embedding is None:
            return self.trainable_embedding
        return torch.cat([self.frozen_embedding, self.trainable_embedding])

    def load_table(self, table):
        fixed = 0 if self.frozen_embedding is None else len(self.frozen_embedding)
        if fixed:
            self.frozen_embedding.copy_(table[:fixed])
        self.trainable_embedding.copy_(table[fixed:])


def prompt_embeddings_from_past_key_values(past_key_values, *, num_virtual_tokens):
    """The table (virtual tokens, layers * 2 * heads * head dim) of the first tokens in a cache of one sequence.

    past_key_values: a transformers Cache, or (keys, values) by layer, each (1, heads, tokens, head dim). Raises
    ValueError where it is empty, has several sequences or too few tokens, or layers differ in shape.
    """
    layers = [tuple(layer[:2]) for layer in layers_of(past_key_values)]
    if not layers:
        raise ValueError("The cache is empty: run the model over a text with use_cache=True first.")
    shape = layers[0][0].shape
    for i, t in ((i, t) for i, pair in enumerate(layers) for t in pair):
        if t.ndim != 4 or len(t) != 1:
            raise ValueError(f"Layer {i} of the cache is {tuple(t.shape)}; (1, heads, tokens, head dim) is needed.")
        if (t.shape[1], t.shape[3]) != (shape[1], shape[3]):
            raise ValueError(
                f"Layer {i} of the cache, {tuple(t.shape)}, has other heads than the first, {tuple(shape)}."
            )
        if t.shape[2] < num_virtual_tokens:
            raise ValueError(
                f"The cache holds {t.shape[2]} tokens, too few for num_virtual_tokens={num_virtual_tokens}."
            )
    parts = [t[0, :, :num_virtual_tokens].transpose(0, 1).flatten(1) for pair in layers for t in pair]
    return torch.cat(parts, dim=1)


def layers_of(cache):
    """(keys, values) by layer of any cache. Raises TypeError for what is none."""
    if isinstance(cache, (tuple, list)):
        return cache
    cache = getattr(cache, "self_attention_cache", cache)
    if not isinstance(getattr(cache, "layers", None), list):
        raise TypeError(f"A cache, or a list of (keys, values) by layer, is needed, got {type(cache).__name__}.")
    return [(layer.keys, layer.values) for layer in cache.layers]


@torch.no_grad()
def initialize_kv_prefix_from_past_key_values(model, *, adapter_name=None, past_key_values, num_virtual_tokens=None):
    """Start a Cartridge, or a prefix without projection, from a cache; returns the table that it now has."""
    name, config = _kv_adapter(model, adapter_name)
    count = config.num_virtual_tokens if num_virtual_tokens is None else num_virtual_tokens
    table = prompt_embeddings_from_past_key_values(past_key_values, num_virtual_tokens=count)
    model.prompt_encoder[name].load_tables({"prompt_embeddings": table})
    return table


@torch.no_grad()
def initialize_kv_prefix_from_text(
    model, tokenizer, *, text, adapter_name=None, num_virtual_tokens=None, use_chat_template=True, max_length=None
):
    """Start a Cartridge, or a prefix without projection, from what the base model makes of a text.

    use_chat_template: the text is a system message, where the tokenizer has a template. max_length: tokens to keep.
    """
    name, _ = _kv_adapter(model, adapter_name)
    if use_chat_template and getattr(tokenizer, "chat_template", None):
        message = [{"role": "system", "content": text}]
        ids = tokenizer.apply_chat_template(message, tokenize=True, return_dict=False, return_tensors="pt")
    else:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
    ids = ids[:, :max_length].to(model.device)
    with model.disable_adapter():
        cache = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True).past_key_values
    return initialize_kv_prefix_from_past_key_values(
        model, adapter_name=name, past_key_values=cache, num_virtual_tokens=num_virtual_tokens
    )


def _kv_adapter(model, name):
    """(name, config) of an adapter that is a table of keys and values. Raises ValueError for others."""
    name = model.active_adapter if name is None else name
    config = model.peft_config[name]
    if config.peft_type not in (PeftType.CARTRIDGE, PeftType.PREFIX_TUNING):
        raise AdapterError(f"Adapter {name!r} must be a CARTRIDGE or PREFIX_TUNING adapter, it is {config.peft_type}.")
    if getattr(config, "prefix_projection", False):
        raise AdapterError(f"Adapter {name!r} has prefix_projection=True: its keys and values cannot be set directly.")
    return name, config


def compose_cartridge_adapters(adapter_paths, *, output_path, safe_serialization=True):
    """Join the Cartridges in several folders, end to end, into one at `output_path`; the first's tokens stay frozen.

    Raises ValueError for fewer than two, for other methods, and for Cartridges of differently built models.
    """
    from peft.storage.files import commit_files
    from peft.weights import load_peft_weights, serialised

    if len(adapter_paths) < 2:
        raise AdapterError(f"At least two adapters are needed to compose, got {len(adapter_paths)}.")
    configs = {str(path): PeftConfig.from_pretrained(str(path)) for path in adapter_paths}
    first = configs[str(adapter_paths[0])]
    for path, config in configs.items():
        if config.peft_type != PeftType.CARTRIDGE:
            raise AdapterError(f"{path} is not a CARTRIDGE adapter but {config.peft_type}.")
        if differing := [n for n in LAYOUT if getattr(config, n) != getattr(first, n)]:
            raise AdapterMismatchError(
                f"{path} was made for another model than {adapter_paths[0]}: {', '.join(differing)} differ."
            )
    tables = [load_peft_weights(str(path), device="cpu")["prompt_embeddings"] for path in adapter_paths]
    table = torch.cat(tables)
    config = dataclasses.replace(first, num_virtual_tokens=len(table))
    name, data = serialised({"prompt_embeddings": table}, safe_serialization)
    commit_files(Path(output_path), {name: data, "adapter_config.json": config.to_json().encode()})


register("CARTRIDGE", CartridgeConfig, encoder=CartridgeEncoder)
