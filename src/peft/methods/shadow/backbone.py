"""The small model that runs beside a transformer of transformers: how it is made, what it reads, where it caches."""

import copy

import torch
from torch import nn
from transformers import AutoModel
from transformers.cache_utils import Cache, DynamicCache

from peft.core import match
from peft.core.around import parameters_of
from peft.errors import AdapterError, ConfigError
from peft.methods.shadow.config import MIRROR
from peft.prompts.insert import CACHE_NAMES

MLP_WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "d_ff")  # what configs call it


def owns(model):
    config = getattr(model, "config", None)
    return hasattr(model, "base_model") and config is not None and not getattr(config, "is_encoder_decoder", False)


def blocks(model):
    """Names of the model's blocks."""
    inner = model.base_model
    found = next((m for key, m in match.block_lists(inner) if "." not in key), None)
    if found is None:
        raise ConfigError(
            f"{type(inner).__name__} has no list of blocks of its own; name its blocks in target_modules, for "
            r"example r'encoder\.layer\.\d+'."
        )
    key = next(key for key, _, m in match.walk(model) if m is found)
    return [f"{key}.{i}" for i in range(len(found))]


def check_block(key):
    if not key.rpartition(".")[2].isdigit():
        raise ConfigError(f"Shadow adapts whole blocks, which are members of a list; {key} is none.")


def make(base, c):
    """(backbone, projection from its width to that of the base's text model) for a config."""
    inner = base.base_model
    mirrored = c.shadow_model == MIRROR
    backbone = type(inner)(mirror_config(inner.config, c)) if mirrored else AutoModel.from_pretrained(c.shadow_model)
    old, new = width(base.config), width(backbone.config)
    if mirrored and c.share_embeddings and old == new and "embed_tokens" in backbone._modules:
        backbone.embed_tokens = None  # other names for it stay: files have them, though nothing reads them
    projection = nn.Identity() if old == new else nn.Linear(new, old, bias=False)
    place = {"device": inner.device, "dtype": inner.dtype}
    return backbone.to(**place), projection.to(**place)


def width(config):
    return config.get_text_config().hidden_size


def mirror_config(config, c):
    """A base model's config with the sizes that `c` gives."""
    small = copy.deepcopy(config)
    depth, layers = config.num_hidden_layers, c.shadow_num_hidden_layers or 1
    small.num_hidden_layers = layers
    for name, value in vars(small).items():
        if isinstance(value, list) and len(value) == depth:  # what the config says layer by layer
            setattr(small, name, (value * layers)[:layers])
    small.hidden_size = c.shadow_hidden_size or small.hidden_size
    small.num_attention_heads = heads = c.shadow_num_attention_heads or small.num_attention_heads
    shared = getattr(small, "num_key_value_heads", None) or 1
    if heads % shared:
        raise ConfigError(
            f"shadow_num_attention_heads={heads} must be a multiple of the base model's {shared} key and value heads."
        )
    if c.shadow_intermediate_size is not None:
        known = [name for name in MLP_WIDTHS if name in small.to_dict()]
        if not known:
            raise ConfigError(
                f"{type(config).__name__} names no width of its MLPs; leave out shadow_intermediate_size."
            )
        setattr(small, known[0], c.shadow_intermediate_size)
    return small


class Run:
    """One forward of the backbone beside one of the base model.

    given: the arguments of the base's forward by name. Afterwards `state` is what the backbone returned, and `keep`
    lets the base's cache carry the backbone's.
    """

    def __init__(self, base, backbone, c, given):
        self.base, self.backbone, self.given = base, backbone, given
        self.cache = next((given[n] for n in CACHE_NAMES if given.get(n) is not None), None)
        use_cache = given.get("use_cache")
        use_cache = getattr(base.config, "use_cache", False) if use_cache is None else use_cache
        arguments = {n: given[n] for n in ("attention_mask", "position_ids") if given.get(n) is not None}
        self.new = None
        known = parameters_of(type(backbone))
        name = next((n for n in CACHE_NAMES if n in known), None)
        if name is not None and (use_cache or self.cache is not None):
            arguments[name] = self._cache()
        arguments = {**arguments, "use_cache": bool(use_cache), **self._embedded(c, given)}
        if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
            arguments = {n: v for n, v in arguments.items() if n in known}
        self.state = backbone(**arguments).last_hidden_state

    def _embedded(self, c, given):
        """What the backbone reads: the base's embeddings where it shares them, else the tokens themselves."""
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        same = width(self.backbone.config) == width(self.base.config)
        if c.shadow_model == MIRROR and c.share_embeddings and same:
            return {"inputs_embeds": self.base.get_input_embeddings()(ids) if embeds is None else embeds}
        if ids is not None:
            return {"input_ids": ids}
        if embeds is None or not same:
            raise AdapterError("This Shadow backbone has embeddings of its own, so it needs input_ids.")
        return {"inputs_embeds": embeds}

    def _cache(self):
        """The backbone's part of the base's cache: its layers stand behind the base's, so that whatever reorders or
        crops the cache reaches them."""
        cache, past = self.cache, 0
        if cache is not None:
            if not isinstance(cache, Cache) or cache.is_compileable or cache.offloading:
                raise AdapterError(
                    f"Shadow needs a cache that can grow and stays in place, not a {type(cache).__name__}."
                )
            past = cache.get_seq_length()
        own = len(DynamicCache(config=self.base.config).layers)
        if cache is not None and len(cache.layers) > own:
            behind = Cache(layers=cache.layers[own:])
            if behind.get_seq_length() == past and len(behind.layers) == self.backbone.config.num_hidden_layers:
                return behind
        if past:
            raise AdapterError(
                "The cache was made without the active Shadow adapter, which knows nothing of its tokens."
            )
        self.new = DynamicCache(config=self.backbone.config)
        return self.new

    def keep(self, out):
        """Put the backbone's cache behind the base's, which `out` returns if it was not given."""
        found = [self.cache, *(getattr(out, n, None) for n in CACHE_NAMES)]
        cache = next((c for c in found if isinstance(c, Cache)), None)
        if self.new is not None and cache is not None:
            cache.layers.extend(self.new.layers)


def stems(backbone):
    """The parts of a backbone trained elsewhere that stay as they are."""
    return [backbone.get_input_embeddings()]


def alone(tuner, name, copy):
    """The backbone with its head, as a model of its own."""
    from peft.methods.shadow.detached import DetachedShadowModel

    return DetachedShadowModel.of(tuner, name, copy)


def last_tokens(states, mask):
    """(batch, width): the state of each sequence's last token, by a mask (batch, tokens) or the end."""
    if mask is None or mask.ndim != 2:
        return states[:, -1]
    positions = torch.arange(mask.shape[1], device=mask.device)
    return states[torch.arange(len(states), device=states.device), (positions * (mask != 0)).argmax(-1)]
