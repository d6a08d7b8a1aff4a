"""Load bottleneck adapters that the `adapters` library (AdapterHub) saved, with the outputs that they have there.

That library puts every adapter at the end of an attention or feed-forward part, where it sees the part's output h, the
residual stream r, and a norm over both if the model has it there. Here an adapter sits on the module that sees what its
settings ask for: the last linear layer (h), the norm, or the block; r is what the part's first module gets (a tap).
"""

import re
import warnings
from dataclasses import dataclass

import torch

from peft.core import match
from peft.core.checkpoint import PREFIX, set_peft_model_state_dict
from peft.errors import AdapterError, CheckpointError, PeftWarning
from peft.loading import requires_grad_of, restore_requires_grad
from peft.methods.bottleneck.activations import ACTIVATIONS
from peft.methods.bottleneck.config import BottleneckConfig
from peft.model import PeftModel
from peft.storage import hub
from peft.storage.files import read_json
from peft.weights import read_pickle, read_safetensors
from peft.wrap import get_peft_model

CONFIG_NAME = "adapter_config.json"
WEIGHTS, HEADS = ("adapter.safetensors", "pytorch_adapter.bin"), ("model_head.safetensors", "pytorch_model_head.bin")
NO_EFFECT = {  # settings that count when an adapter is made, or that its tensors tell
    "cross_adapter",
    "hypercomplex_nonlinearity",
    "init_weights",
    "init_weights_seed",
    "inv_adapter_reduction_factor",
    "leave_out",
    "mh_adapter",
    "output_adapter",
    "phm_c_init",
    "phm_init_range",
    "phm_rank",
    "reduction_factor",
}
DEFAULTS = {  # of files that leave them out
    "non_linearity": "relu",
    "original_ln_before": False,
    "original_ln_after": True,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "ln_before": False,
    "ln_after": False,
    "is_parallel": False,
    "scaling": 1.0,
    "use_gating": False,
    "dropout": 0.0,
    "stochastic_depth": 0.0,
    "inv_adapter": None,
    "phm_layer": False,
    "phm_dim": 4,
    "phm_bias": True,
    "factorized_phm_W": True,
    "factorized_phm_rule": False,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "learn_phm": True,
}
OTHER_NAMES = {"leaky_relu": "leakyrelu", **dict.fromkeys(("gelu_fast", "gelu_pytorch_tanh"), "gelu_new")}


@dataclass(frozen=True)
class Family:
    """Where a type of model has its parts. A part is (end of its linear layer, end of the module whose input is r)."""

    place: str  # regex of what stands before `.<name>.` in a file's keys; group 1 is the part's root
    parts: dict[str, tuple[str, str]]  # root's ending or the kind of place in the key: the part
    norm: str | None = None  # the norm over h + r
    embedding: str = ""


POST_NORM = Family(
    r"(.*layer\.\d+)\.(attention\.output|output)\.adapters",
    {
        "attention.output": ("attention.output.dense", "attention.self"),
        "output": ("output.dense", "intermediate"),
    },
    norm="LayerNorm",
    embedding="embeddings.LayerNorm",
)
GPT2 = Family(
    r"(.*h\.\d+)\.(attention|output)_adapters\.adapters",
    {"attention": ("attn.c_proj", "ln_1"), "output": ("mlp.c_proj", "ln_2")},
    embedding="drop",
)
LLAMA = Family(
    r"(.*layers\.\d+)\.(attention|output)_adapters\.adapters",
    {
        "attention": ("self_attn.o_proj", "input_layernorm"),
        "output": ("mlp.down_proj", "post_attention_layernorm"),
    },
    embedding="embed_tokens",
)
T5 = Family(
    r"(.*block\.\d+\.layer\.\d)()\.adapters",
    {
        "SelfAttention": ("SelfAttention.o", "layer_norm"),
        "EncDecAttention": ("EncDecAttention.o", "layer_norm"),
        "DenseReluDense": ("DenseReluDense.wo", "layer_norm"),
    },
    embedding="encoder.embed_tokens",
)
FAMILIES = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta"), POST_NORM),
    "gpt2": GPT2,
    **dict.fromkeys(("llama", "mistral"), LLAMA),
    **dict.fromkeys(("t5", "mt5"), T5),
}
TENSORS = (  # regex in a file's key after the adapter's name: field of Bottleneck
    (r"adapter_(down|up)(?:\.[01])?\.(weight|bias)", r"bottleneck_\1.\2"),
    (r"adapter_(down|up)(?:\.[01])?\.W", r"bottleneck_\1.weight"),
    (r"adapter_(down|up)(?:\.[01])?\.W_(left|right)", r"bottleneck_\1.\2"),
    (r"adapter_(down|up)(?:\.[01])?\.b", r"bottleneck_\1_bias"),
    (r"adapter_(down|up)(?:\.[01])?\.phm_rule", r"bottleneck_\1_rule.weight"),
    (r"adapter_(down|up)(?:\.[01])?\.phm_rule_(left|right)", r"bottleneck_\1_rule.\2"),
    (r"adapter_norm_(before|after)\.(weight|bias)", r"bottleneck_norm_\1.\2"),
    (r"gate\.(weight|bias)", r"bottleneck_gate.\1"),
    (r"scaling", "bottleneck_scale"),
)
COUPLING = {"F.0": "first_down", "F.2": "first_up", "G.0": "second_down", "G.2": "second_up"}
SHARED = (
    (r"phm_rule", "bottleneck_rule.weight"),
    (r"phm_rule_(left|right)", r"bottleneck_rule.\1"),
    (r"W_(down|up)", r"bottleneck_shared_\1.weight"),
    (r"W_(down|up)_(left|right)", r"bottleneck_shared_\1.\2"),
)


def load_adapters_checkpoint(model, model_id, adapter_name="default", is_trainable=False, **kwargs):
    """A PeftModel with a bottleneck adapter that the `adapters` library saved to a folder or the hub.

    model: a base model, or a PeftModel with bottleneck adapters, which gets one more. The prediction head of such a
    folder is not loaded. kwargs: hub options (subfolder, revision, token, ...). Raises CheckpointError, naming the
    setting or the tensor, for what has no equal here; the model then is as it was.
    """
    options, _ = hub.split_options(kwargs)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    config, tensors = convert_adapters_checkpoint(base, model_id, **options)
    config.inference_mode = not is_trainable
    trainable = requires_grad_of(base)
    fresh = not isinstance(model, PeftModel)
    if fresh:
        model = get_peft_model(model, config, adapter_name, low_cpu_mem_usage=True)
    elif adapter_name in model.peft_config:
        raise AdapterError(f"There is an adapter {adapter_name!r} already; give this one another name.")
    else:
        model.add_adapter(adapter_name, config, low_cpu_mem_usage=True)
    try:
        set_peft_model_state_dict(model, tensors, adapter_name, strict=True)
    except BaseException:
        if fresh:
            model.base_model.unload()
            restore_requires_grad(trainable)
        else:
            model.delete_adapter(adapter_name)
        raise
    return model if is_trainable else model.eval()


def convert_adapters_checkpoint(base, model_id, **options):
    """(config, {file key: tensor}) that make of the base model what the `adapters` library makes of it."""
    path = hub.find_file(model_id, CONFIG_NAME, **options)
    if path is None:
        raise CheckpointError(f"There is no {CONFIG_NAME} at {model_id}.")
    data = read_json(path)
    settings = _settings(path, data)
    model_type = getattr(getattr(base, "config", None), "model_type", None)
    if model_type not in FAMILIES:
        raise CheckpointError(
            f"Adapters of the adapters library can be loaded into models of the types {', '.join(FAMILIES)}, but this "
            f"one's model_type is {model_type!r}."
        )
    tensors = read_first(model_id, WEIGHTS, **options)
    if tensors is None:
        raise CheckpointError(f"There is neither {' nor '.join(WEIGHTS)} at {model_id}.")
    _warn_about_head(base, read_first(model_id, HEADS, **options), path)
    return _Conversion(base, FAMILIES[model_type], settings, path, str(data.get("name"))).of(tensors)


def read_first(model_id, names, **options):
    """The tensors of the first of these files that is there; None without any."""
    for name in names:
        if (path := hub.find_file(model_id, name, **options)) is not None:
            return read_safetensors(path) if name.endswith("safetensors") else read_pickle(path, "cpu")
    return None


def _settings(path, data):
    """All settings of the adapter. Raises CheckpointError for those that have no equal here."""
    given = data.get("config")
    if not isinstance(given, dict) or given.get("architecture") is not None:
        kind = given.get("architecture") if isinstance(given, dict) else given
        raise CheckpointError(
            f"{path}: config.architecture is {kind!r}; only bottleneck adapters of the adapters library can be loaded."
        )
    settings = {**DEFAULTS, **{k: v for k, v in given.items() if k not in NO_EFFECT | {"architecture"}}}
    if unknown := sorted(settings.keys() - DEFAULTS.keys()):
        raise CheckpointError(f"{path}: config has the unknown settings {unknown}, which may change what it computes.")
    name = str(settings["non_linearity"]).lower()
    settings["non_linearity"] = OTHER_NAMES.get(name, name)
    if settings["non_linearity"] not in ACTIVATIONS:
        raise _refusal(path, "non_linearity", name, f"the known ones are {', '.join(ACTIVATIONS)}")
    if settings["stochastic_depth"]:
        raise _refusal(path, "stochastic_depth", settings["stochastic_depth"], "it must be 0 here")
    if settings["inv_adapter"] not in (None, "nice"):
        raise _refusal(path, "inv_adapter", settings["inv_adapter"], "only 'nice' has an equal here")
    return settings


def _refusal(path, field, value, why):
    return CheckpointError(f"{path}: config.{field}={value!r} cannot be loaded: {why}.")


def _warn_about_head(base, head, path):
    """Say that a head in the folder, other than the model's own, is not loaded."""
    own = dict(base.named_parameters())
    differ = [k for k, t in (head or {}).items() if k not in own or not torch.equal(own[k].detach().cpu(), t)]
    if differ:
        warnings.warn(
            f"{path}: the folder also holds a prediction head ({', '.join(differ)}), which is not loaded. Load it into "
            "the base model yourself if you need it.",
            PeftWarning,
            stacklevel=4,
        )


class _Conversion:
    """One adapter on its way from one library's form to the other's."""

    def __init__(self, base, family, settings, path, name):
        self.family, self.settings, self.path, self.name = family, settings, path, re.escape(name)
        self.modules = {key for key, _, _ in match.walk(base)}

    def of(self, tensors):
        """(config, tensors) from the tensors of the file."""
        parts, found, embedding = {}, {}, None
        for key, tensor in tensors.items():
            if shared := re.fullmatch(rf"(?:.*\.)?shared_parameters\.{self.name}\.(.*)", key):
                found[f"base_model.{self._renamed(shared[1], SHARED, key)}"] = tensor
            elif inverse := re.fullmatch(rf"(?:.*\.)?invertible_adapters\.{self.name}\.([FG]\.[02])(\..*)", key):
                embedding = self._module(self.family.embedding, key)
                found[f"{PREFIX}{embedding}.bottleneck_coupling.{COUPLING[inverse[1]]}{inverse[2]}"] = tensor
            elif place := re.fullmatch(rf"{self.family.place}\.{self.name}\.(.*)", key):
                if not (self.settings["ln_before"] and place[3].startswith("adapter_down.0.")):  # the norm, once more
                    part = self._part(place[1], place[2], key)
                    parts.setdefault(part, {})[self._renamed(place[3], TENSORS, key)] = tensor
            else:
                raise self._strange(key)
        if not parts:
            raise CheckpointError(f"{self.path}: the weights beside it hold no bottleneck adapter of its name.")
        self._check_shared(found)
        where, fields = self._placement(any("attention" in name.lower() for _, name in parts))
        sizes, taps = {}, {}
        for (root, name), inside in parts.items():
            linear, taps[linear] = self.family.parts[name]
            target = root if where == "block" else f"{root}.{linear}"
            if where == "norm":
                target = f"{target.rpartition('.')[0]}.{self.family.norm}"
            target = self._module(target, root)
            sizes[target] = _size({**found, **inside})
            found |= {f"{PREFIX}{target}.{field}": tensor for field, tensor in inside.items()}
        if fields["reads"] != "output":
            fields["tap_modules"] = taps
        if embedding:
            fields |= {"invertible": self.settings["inv_adapter"], "invertible_modules": [embedding]}
        return self._config(fields, sizes, found), found

    def _config(self, fields, sizes, found):
        s = self.settings
        usual = max(sizes.values(), key=list(sizes.values()).count)
        if s["phm_layer"]:
            fields |= {
                "phm_dim": s["phm_dim"],
                "phm_rank": _last(found, r"_down\.left", 2),
                "phm_rule_rank": _last(found, r"rule\.left", 2),
                "phm_shared_rule": s["shared_phm_rule"],
                "phm_shared_weights": s["shared_W_phm"],
                "phm_bias": s["phm_bias"],
                "phm_learn_rule": s["learn_phm"],
            }
        if half := _last(found, r"first_down\.weight", 1):
            fields["invertible_reduction_factor"] = half / (_last(found, r"first_down\.weight", 0) + 0.5)
        return BottleneckConfig(
            target_modules=set(sizes),
            bottleneck_size=usual,
            size_pattern={re.escape(k): n for k, n in sizes.items() if n != usual} or None,
            non_linearity=s["non_linearity"],
            scaling=s["scaling"],
            gating=s["use_gating"],
            norm_before=s["ln_before"],
            norm_after=s["ln_after"],
            dropout=s["dropout"],
            **fields,
        )

    def _placement(self, attention):
        """(where the adapters go: linear, norm or block; the fields that say what they compute there)."""
        s, post_norm = self.settings, self.family.norm is not None
        within = s["ln_after"] and s["adapter_residual_before_ln"] and not s["is_parallel"]
        if s["is_parallel"] or not s["original_ln_before"]:
            if not s["original_ln_after"]:
                raise _refusal(self.path, "original_ln_after", False, "the residual connection would be lost")
            return "linear", {"reads": "input" if s["is_parallel"] else "output", "residual_before_norm": within}
        kept = s["residual_before_ln"] is True and s["original_ln_after"]
        whole = s["residual_before_ln"] is False and not s["original_ln_after"]
        if not kept and not whole:
            why = f"not together with original_ln_after={s['original_ln_after']}"
            raise _refusal(self.path, "residual_before_ln", s["residual_before_ln"], why)
        between = not post_norm and ((kept and within) or (attention and self.family is not T5))
        if within and (whole if between else kept):
            raise _refusal(self.path, "adapter_residual_before_ln", True, "no module of this model sees what it needs")
        if between:
            return "linear", {"reads": "both", "residual_before_norm": within}
        where = "norm" if post_norm else "block"
        return where, {"reads": "output", "renorm": post_norm and kept, "residual_before_norm": within}

    def _part(self, root, ending, key):
        """(path of the block that the part lies in, name of the part)."""
        if ending:
            return root, ending
        root = self._module(root, key)
        return root, next(name for name in self.family.parts if f"{root}.{name}" in self.modules)

    def _module(self, path, key):
        """The model's name of a module that the file calls `path`: one of the two may stand inside a larger model."""
        found = [m for m in self.modules if m == path or m.endswith(f".{path}") or path.endswith(f".{m}")]
        if not found:
            raise self._strange(key)
        return max(found, key=len)

    def _check_shared(self, found):
        """Raise CheckpointError where layers share something that the file does not hold."""
        s = self.settings
        for field, name in (("shared_phm_rule", "bottleneck_rule"), ("shared_W_phm", "bottleneck_shared_down")):
            if s["phm_layer"] and s[field] and not any(f".{name}." in key for key in found):
                raise _refusal(
                    self.path,
                    field,
                    True,
                    "the file does not hold what the layers share, as versions up to 1.3.0 do not save it. Add the "
                    f"tensors shared_parameters.{self.name}.* of the trained model to the file",
                )

    def _renamed(self, name, table, key):
        for pattern, field in table:
            if found := re.fullmatch(pattern, name):
                return found.expand(field)
        raise self._strange(key)

    def _strange(self, key):
        return CheckpointError(
            f"{self.path}: nothing in this model is the place of the tensor {key!r}. Is it the model that the adapter "
            "was trained on?"
        )


def _size(tensors):
    """The width of a bottleneck, from its tensors and those that all share."""
    for field, axis in (("bottleneck_down.weight", 0), ("bottleneck_down_bias", 0)):
        if field in tensors and tensors[field].ndim < 3:
            return tensors[field].shape[axis]
    terms = next(t for k, t in tensors.items() if re.search(r"_down\.(right|weight)$", k) and t.ndim == 3)
    return len(terms) * terms.shape[2]


def _last(tensors, pattern, axis):
    """The size along an axis of the first tensor whose key ends so; 0 where there is none."""
    return next((t.shape[axis] for k, t in tensors.items() if re.search(rf"{pattern}$", k)), 0)
