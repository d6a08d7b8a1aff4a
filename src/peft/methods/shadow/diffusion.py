"""The small model that runs beside a Flux2 transformer of diffusers: how it is made, what it reads, where it starts.

It is a Flux2 transformer itself, of which the adapter runs the single-stream blocks alone: they read what the base's
first adapted block reads, text and image tokens in one stream. The rest of it is in files, though nothing reads it.
"""

import re

import torch
from torch import nn

from peft import quant
from peft.core import match
from peft.core.layer import AdapterLayer
from peft.errors import AdapterError, ConfigError
from peft.methods.shadow.config import MIRROR

MODEL = "Flux2Transformer2DModel"
LIST = "single_transformer_blocks"
SINGLE = 2  # single-stream blocks of a backbone for each of its double-stream blocks
STEMS = ("time_guidance_embed", "x_embedder", "context_embedder")
SAME = (  # what a backbone that was trained elsewhere has in common with the base
    "in_channels",
    "out_channels",
    "attention_head_dim",
    "joint_attention_dim",
    "timestep_guidance_channels",
    "axes_dims_rope",
    "guidance_embeds",
)
FUSED = (  # tensors made of several parts, w as wide as the model, m as wide as an MLP: (name, dimension, parts)
    (r"double_stream_modulation_\w+\.linear\.weight", 0, "wwwwww"),
    (r"single_stream_modulation\.linear\.weight", 0, "www"),
    (r"single_transformer_blocks\.\d+\.attn\.to_qkv_mlp_proj\.weight", 0, "wwwmm"),
    (r"single_transformer_blocks\.\d+\.attn\.to_out\.weight", 1, "wm"),
    (r"norm_out\.linear\.weight", 0, "ww"),
)


def owns(model):
    return any(cls.__name__ == MODEL for cls in type(model).__mro__)


def blocks(model):
    """Names of the single-stream blocks."""
    return [f"{LIST}.{i}" for i in range(len(getattr(model, LIST)))]


def check_block(key):
    if not re.fullmatch(rf"{LIST}\.\d+", key):
        raise ConfigError(f"Shadow adapts the members of a Flux2 transformer's {LIST}; {key} is none.")


def width(config):
    return config.num_attention_heads * config.attention_head_dim


def make(base, c):
    """(backbone, projection from its width to the base's) for a config; both start from the base's own weights."""
    with torch.device(base.device):
        if c.shadow_model == MIRROR:
            small = type(base).from_config(dict(base.config), **mirror_sizes(base.config, c))
        else:
            small = type(base).from_pretrained(c.shadow_model)
            _check_fits(small.config, base.config)
    if c.shadow_model == MIRROR:
        _copy(base, small)
    old, new = width(base.config), width(small.config)
    if c.shadow_model == MIRROR and c.share_embeddings and old == new:
        for stem in STEMS:
            setattr(small, stem, None)
    projection = nn.Identity()
    if old != new:
        projection = nn.Linear(new, old, bias=False)
        nn.init.eye_(projection.weight)
    place = {"device": base.device, "dtype": base.dtype}
    return FluxBackbone(small).to(**place), projection.to(**place)


def mirror_sizes(config, c):
    """The settings in which a mirror differs from a Flux2 transformer with this config."""
    layers = c.shadow_num_hidden_layers or 1
    most = min(config.num_layers, config.num_single_layers // SINGLE)
    if layers > most:
        raise ConfigError(
            f"shadow_num_hidden_layers={layers} is too many: a backbone has that many of the base's "
            f"{config.num_layers} double-stream blocks and {SINGLE} times as many of its {config.num_single_layers} "
            f"single-stream blocks, so at most {most}."
        )
    per_head, heads = config.attention_head_dim, c.shadow_num_attention_heads
    new = c.shadow_hidden_size or (heads or config.num_attention_heads) * per_head
    if new % per_head or (heads is not None and heads * per_head != new):
        raise ConfigError(
            f"shadow_hidden_size={new} must be shadow_num_attention_heads times {per_head}, the width of one of the "
            f"base's heads; shadow_num_attention_heads is {heads}."
        )
    _check_at_most("shadow_num_attention_heads", new // per_head, config.num_attention_heads)
    old_mlp = int(width(config) * config.mlp_ratio)
    mlp = c.shadow_intermediate_size or old_mlp
    _check_at_most("shadow_intermediate_size", mlp, old_mlp)
    ratio = mlp / new
    return {
        "num_layers": layers,
        "num_single_layers": SINGLE * layers,
        "num_attention_heads": new // per_head,
        "mlp_ratio": ratio if int(new * ratio) == mlp else (mlp + 0.5) / new,  # diffusers rounds the product down
    }


def _check_at_most(name, value, most):
    if value > most:
        raise ConfigError(f"{name} must be at most the base's {most}, as its weights are the start; got {value}.")


def _check_fits(config, base):
    for name in SAME:
        old, new = (list(v) if isinstance(v, (list, tuple)) else v for v in (base[name], config[name]))
        if old != new:
            raise ConfigError(f"shadow_model must have the base's {name}, {old}, and has {new}.")
    _check_at_most("The num_attention_heads of shadow_model", config.num_attention_heads, base.num_attention_heads)


@torch.no_grad()
def _copy(base, small):
    """Give each block the weights of a block of the base, evenly chosen, and of each tensor the leading part."""
    source = _tensors(base)
    for name, p in small.named_parameters():
        W = source[_name_in(base, small, name)].to(p.device, p.dtype)
        for dim in range(W.ndim):
            W = W.index_select(dim, _kept(base, small, name, dim, W.shape[dim], p.shape[dim]).to(W.device))
        p.copy_(W)


def _tensors(model):
    """{name: float tensor} of a model's parameters, whatever adapters it has and however it is stored."""
    found = {}
    for key, _, module in match.walk(model):
        module = module.get_base_layer() if isinstance(module, AdapterLayer) else module
        backend = quant.find(module)
        for name, p in module._parameters.items():
            if p is not None:
                W = backend.unpack(module, backend.get(module, name)) if backend.name and name == "weight" else p
                found[f"{key}.{name}"] = W.detach()
    return found


def _name_in(base, small, name):
    """Where the base has the tensor that the backbone's tensor `name` starts from."""
    parts = name.split(".")
    if parts[0].endswith("transformer_blocks"):
        old, new = len(getattr(base, parts[0])), len(getattr(small, parts[0]))
        parts[1] = str(old - 1 if new == 1 else round(int(parts[1]) * (old - 1) / (new - 1)))
    return ".".join(parts)


def _kept(base, small, name, dim, old, new):
    """The indices that stay when a dimension shrinks from `old` to `new`: the first ones of each part."""
    parts = next((parts for pattern, d, parts in FUSED if d == dim and re.fullmatch(pattern, name)), None)
    if parts is None:
        return torch.arange(new)
    was, now = ({"w": width(m.config), "m": int(width(m.config) * m.config.mlp_ratio)} for m in (base, small))
    starts = [sum(was[part] for part in parts[:i]) for i in range(len(parts))]
    return torch.cat([torch.arange(now[part]) + start for part, start in zip(parts, starts)])


class FluxBackbone(nn.Module):
    """A Flux2 transformer whose single-stream blocks run on what one of the base's reads."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    @property
    def config(self):
        return self.model.config

    def forward(self, hidden_states, temb_mod, **block):
        """The last hidden states (batch, text and image tokens, width) after all single-stream blocks.

        Arguments: a block's. Of hidden states and modulations wider than this model, the leading part is read.
        """
        new = width(self.config)
        hidden_states = hidden_states[..., :new]
        temb_mod = torch.cat([part[..., :new] for part in temb_mod.chunk(3, dim=-1)], dim=-1)
        for single in getattr(self.model, LIST):
            hidden_states = single(hidden_states=hidden_states, temb_mod=temb_mod, **block)
        return hidden_states


class Run:
    """One forward of the backbone, in the middle of one of the base model: `at` its first adapted block.

    given: the arguments of the base's forward by name.
    """

    state = None  # not before that block

    def __init__(self, base, backbone, c, given):
        if given.get("kv_cache_mode") is not None:
            raise AdapterError(
                "Shadow's backbone keeps no keys and values of reference images; call the model without kv_cache_mode."
            )
        self.backbone, self.given = backbone, given

    def at(self, block):
        """The last hidden states, from the arguments of a block of the base by name."""
        return self.backbone(**block)

    def keep(self, out):
        """Nothing is cached."""


def stems(backbone):
    """The parts of a backbone trained elsewhere that stay as they are."""
    return [getattr(backbone.model, stem) for stem in STEMS]


def alone(tuner, name, copy):
    raise NotImplementedError(
        "The Shadow backbone of a Flux2 transformer makes no images alone: its double-stream blocks were not trained."
    )
