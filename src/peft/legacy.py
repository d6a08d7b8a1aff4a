"""Small functions of upstream's semi-private surface that other libraries call. The house does not use them.

Each is a thin reading of what the house has; a function without users here and there may go.
"""

import contextlib
import copy
import functools
import re
import threading
from types import SimpleNamespace

import torch
from torch import nn

from peft import quant
from peft.core import extras, match
from peft.core.layer import AdapterLayer
from peft.core.state import AdapterState
from peft.core.wrappers import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from peft.errors import MergeError
from peft.functional import holders

UPCAST_DTYPES = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
ALLOWED_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DUMMY_MODEL_CONFIG = {"model_type": "custom"}
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"


# -- modules by name -------------------------------------------------------------------------------------------------
def _get_submodules(model, key):
    """(parent, module, its name in the parent) at a dotted path."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def _get_submodules_with_grandparent(model, key):
    """(parent, grandparent or None, module, its name in the parent) at a dotted path."""
    parent, target, name = _get_submodules(model, key)
    above = key.rpartition(".")[0].rpartition(".")[0]
    return parent, model.get_submodule(above), target, name


def find_parameter_name_by_module(model, reference_module):
    """The dotted path of a module, "" where it is not in the model."""
    return next((name for name, module in model.named_modules() if module is reference_module), "")


def _get_input_embeddings_name(model, default=None):
    """The path of the model's input embedding, or `default`."""
    if not hasattr(model, "get_input_embeddings"):
        return default
    return find_parameter_name_by_module(model, model.get_input_embeddings()) or default


def _get_module_names_tied_with_embedding(model):
    """Paths of the parameters that share the input embedding's tensor."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    tied = extras.tied_embeddings(base)
    return [key for key, _, module in match.walk(base) if any(module is t for t in tied[1:])]


def get_device_map(model):
    """{module path: device}: accelerate's map, or the model's one device."""
    return getattr(model, "hf_device_map", None) or {"": next(iter(model.parameters())).device}


def _get_in_out_features(module):
    """(input width, output width) of a layer, (None, None) where it has none."""
    pairs = ("in_features", "out_features"), ("in_channels", "out_channels"), ("num_embeddings", "embedding_dim")
    for inp, out in (*pairs, ("nx", "nf")):
        if hasattr(module, inp) and hasattr(module, out):
            return getattr(module, inp), getattr(module, out)
    return None, None


def clone_module(module, share_weights=False):
    """A copy of a module; share_weights: its parameters and buffers are the original's."""
    if not share_weights:
        return copy.deepcopy(module)
    return copy.deepcopy(module, {id(t): t for t in (*module.parameters(), *module.buffers())})


# -- target names ------------------------------------------------------------------------------------------------------
class _ExcludedModule:
    """What check_target_module_exists returns for a module that exclude_modules or modules_to_save takes out."""

    def __bool__(self):
        return False


def check_target_module_exists(config, key):
    """Whether a config targets the module of this name; an `_ExcludedModule`, which is false, where it is excluded."""
    saved = match.Names(getattr(config, "modules_to_save", None))
    if match.Names(getattr(config, "exclude_modules", None)).match(key) or saved.match(key):
        return _ExcludedModule()
    entry = match.Names(config.target_modules).match(key)
    picked = getattr(config, "layers_to_transform", None)
    if entry is None or picked is None or entry == key:
        return entry is not None
    picked = [picked] if isinstance(picked, int) else picked
    return match.layer_index(key, config.layers_pattern) in picked


def _is_valid_match(key, target_key):
    """Whether `key` is `target_key` or ends with it at a dot."""
    return key == target_key or key.endswith(f".{target_key}")


def match_target_against_key(target_pattern, key):
    """The match of a target regex against a whole module name, or None."""
    return re.fullmatch(target_pattern, key)


def get_pattern_key(pattern_keys, key_to_match):
    """The first pattern that matches a module name or its ending; the name itself where none does."""
    return next((p for p in pattern_keys if match.pattern_value({p: True}, key_to_match, False)), key_to_match)


def inspect_matched_modules(tuner, adapter_name="default"):
    """{"matched": names of the modules with this adapter, "unmatched": the other names}."""
    adapted = {layer.adapters[adapter_name].key for layer in tuner.layers.values() if adapter_name in layer.adapters}
    keys = [key for key, _, _ in match.walk(tuner.model)]
    return {"matched": [k for k in keys if k in adapted], "unmatched": [k for k in keys if k not in adapted]}


def _maybe_include_all_linear_layers(peft_config, model):
    """The config, with "all-linear" replaced by names of this model's layers."""
    if isinstance(peft_config.target_modules, str) and peft_config.target_modules.lower() == match.ALL_LINEAR:
        peft_config.target_modules = match.all_linear(model, peft_config.task_type)
    return peft_config


def _find_minimal_target_modules(target_modules, other_module_names):
    """The smallest set of name endings that matches all targets and no other name. ValueError for no names."""
    if not target_modules or isinstance(target_modules, str):
        raise ValueError("target_modules should be a list or set of strings.")
    return match.minimal_endings(target_modules, other_module_names)


def check_adapters_to_merge(module, adapter_names=None):
    """Names of the adapters (default: the active ones) that a merge of this layer would still put in."""
    return module._mergeable(adapter_names)


# -- training and activating -------------------------------------------------------------------------------------------
def _freeze_adapter(model, adapter_name):
    """Stop training an adapter."""
    for holder in holders(model):
        if isinstance(holder, AdapterLayer) and adapter_name in holder.adapters:
            holder.adapters[adapter_name].set_trainable(False)
        elif isinstance(holder, AuxiliaryTrainingWrapper) and adapter_name in holder.adapter_names:
            for p in holder.trained(adapter_name):
                p.requires_grad = False


def _set_adapter(model, adapter_name, inference_mode=False):
    """Activate adapters in the modules that are trained whole or by row."""
    for holder in holders(model):
        if isinstance(holder, AuxiliaryTrainingWrapper):
            holder.set_adapter(adapter_name, inference_mode)


def _set_trainable(
    model,
    adapter_name,
    module_names,
    inference_mode,
    strict_module_check=False,
    wrapper_cls=None,
    activate_adapter=True,
    **kwargs,
):
    """Give modules a trained copy for an adapter; returns the wrappers.

    Raises ValueError for names that match nothing if strict_module_check, and for other wrapper classes than
    ModulesToSaveWrapper: `trainable_token_indices` of a config makes those.
    """
    if wrapper_cls not in (None, ModulesToSaveWrapper):
        raise ValueError(f"_set_trainable only makes ModulesToSaveWrappers, not {wrapper_cls.__name__}.")
    names = match.Names(list(module_names or ()))
    if strict_module_check and not any(names.match(key) for key, _, _ in match.walk(model)):
        raise ValueError(f"Target modules {set(module_names)} not found in the base model.")
    config = SimpleNamespace(modules_to_save=module_names, inference_mode=inference_mode)
    set_additional_trainable_modules(model, config, None, adapter_name, activate_adapter)
    wrappers = [w for w in holders(model) if isinstance(w, ModulesToSaveWrapper) and adapter_name in w.adapter_names]
    for wrapper in wrappers:
        wrapper.original_module.requires_grad_(False)
    return wrappers


def set_additional_trainable_modules(model, peft_config, model_config, adapter_name, activate_adapter=True):
    """Wrap the modules that a config trains whole or by row."""
    there = holders(model)
    state = there[0].state if there else AdapterState([adapter_name] if activate_adapter else [])
    extras.add(SimpleNamespace(model=model, state=state), adapter_name, peft_config, {"autocast": True, "empty": False})
    if activate_adapter:
        _set_adapter(model, adapter_name, peft_config.inference_mode)


@contextlib.contextmanager
def onload_layer(layer):
    """While inside, weights that accelerate offloaded are on their execution device; changes to them are kept."""
    hooked = [m for m in layer.modules() if getattr(getattr(m, "_hf_hook", None), "offload", False)]
    for module in hooked:
        module._hf_hook.pre_forward(module)
    try:
        yield
    finally:
        for module in hooked:
            hook = module._hf_hook
            for name, p in module.named_parameters(recurse=False):
                with contextlib.suppress(KeyError):
                    _keep(hook.weights_map, name, p.detach())
            hook.post_forward(module, torch.tensor([]))


def _keep(offloaded, name, value):
    """Write a changed weight back to where accelerate keeps it."""
    value = value.to(offloaded[name].device)
    if torch.equal(offloaded[name], value):
        return
    offloaded[name].copy_(value)
    if not torch.equal(offloaded[name], value):  # a map on disk gives out copies
        raise MergeError(f"{name} is offloaded to disk and cannot be changed there; offload to the CPU instead.")


def dequantize_module_weight(module):
    """The weight of a layer as a float Parameter, however it is stored."""
    backend = quant.find(module)
    packed = backend.get(module, "weight")
    return (
        packed
        if isinstance(packed, nn.Parameter) and not backend.name
        else nn.Parameter(backend.unpack(module, packed), requires_grad=False)
    )


def get_bnb_param_type(param):
    """ "4bit" or "8bit" for bitsandbytes' parameters, else False."""
    return {"Params4bit": "4bit", "Int8Params": "8bit"}.get(type(param).__name__, False)


# -- tensors and values ------------------------------------------------------------------------------------------------
def _get_batch_size(input_ids, inputs_embeds):
    """Number of samples in whichever of the two is given. Raises ValueError where neither is."""
    if input_ids is None and inputs_embeds is None:
        raise ValueError("You have to provide either input_ids or inputs_embeds")
    return (inputs_embeds if input_ids is None else input_ids).shape[0]


def transpose(weight, fan_in_fan_out):
    """The weight, transposed if fan_in_fan_out; a Parameter stays one."""
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T) if isinstance(weight, nn.Parameter) else weight.T


def id_tensor_storage(tensor):
    """(device, address, size): equal for tensors that share their memory."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def str_to_bool(value):
    """1 or 0 for the usual words. Raises ValueError for others."""
    word = value.lower()
    if word in ("y", "yes", "t", "true", "on", "1"):
        return 1
    if word in ("n", "no", "f", "false", "off", "0"):
        return 0
    raise ValueError(f"invalid truth value {word!r}")


# -- making modules without memory -------------------------------------------------------------------------------------
_really = threading.local()  # .made is True inside a function that skip_init_on_device wraps


@contextlib.contextmanager
def init_empty_weights(include_buffers=None):
    """While inside, the parameters of new modules are on the meta device; with include_buffers all new tensors are."""
    if include_buffers:
        with torch.device("meta"):
            yield
        return
    register = nn.Module.register_parameter

    def register_empty(module, name, param):
        register(module, name, param)
        if param is not None and not getattr(_really, "made", False):
            module._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)

    nn.Module.register_parameter = register_empty
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def skip_init_on_device(function):
    """The function, whose modules have memory even inside `init_empty_weights`."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        before, _really.made = getattr(_really, "made", False), True
        try:
            return function(*args, **kwargs)
        finally:
            _really.made = before

    return wrapper


# -- caches of transformers before 4.54 --------------------------------------------------------------------------------
def bloom_model_postprocess_past_key_value(past_key_values):
    """Tensors that together hold keys, then values (2 x layers, batch, heads, length, width) -> ((key, value) a layer).

    Keys are (batch x heads, width, length), values (batch x heads, length, width).
    """
    keys, values = torch.cat(tuple(past_key_values)).chunk(2)
    layers, batch, heads, length, width = keys.shape
    keys = keys.transpose(2, 3).reshape(layers, batch * heads, width, length)
    return tuple(zip(keys, values.reshape(layers, batch * heads, length, width)))


def starcoder_model_postprocess_past_key_value(past_key_values):
    """(2, batch, 1, length, width) for each layer -> (batch, length, 2 x width), as multi-query caches have it."""
    return tuple(torch.cat([keys, values], dim=-1)[:, 0] for keys, values in past_key_values)


# -- keys of files -----------------------------------------------------------------------------------------------------
def _remove_adapter_name_from_state_dict_key(key, adapter_name):
    """A model's key without the adapter's name, its last part or the last but one."""
    *path, last = key.split(".")
    if last == adapter_name:
        return ".".join(path)
    if path and path[-1] == adapter_name:
        return ".".join([*path[:-1], last])
    return key


def _insert_adapter_name_into_state_dict(state_dict, adapter_name, parameter_prefix):
    """{key in a file: tensor} -> {key in the model: tensor}: the adapter's name follows the method's parameter."""
    pattern = re.compile(rf"(.*\b{re.escape(parameter_prefix)}[^.]*)(.*)")
    return {pattern.sub(lambda m: f"{m[1]}.{adapter_name}{m[2]}", k): v for k, v in state_dict.items()}


def has_valid_embedding_base_layer(layer):
    """Whether a layer is an adapted linear or embedding layer."""
    return isinstance(getattr(layer, "base_layer", None), (nn.Linear, nn.Embedding))


def get_embedding_layer_name(model, layer, is_embedding_in_target_modules):
    """The path of an embedding's original module in the model, or None."""
    wanted = getattr(layer, "base_layer", layer) if is_embedding_in_target_modules else layer
    return find_parameter_name_by_module(model, wanted) or None


def get_quantization_config(model, method):
    """The quantization config of a model quantized with this method, or None."""
    if getattr(model, "quantization_method", None) != method:
        return None
    return getattr(getattr(model, "config", None), "quantization_config", None)


def check_file_exists_on_hf_hub(repo_id, filename, **kwargs):
    """Whether a repository on the hub has a file; None where that cannot be found out."""
    from huggingface_hub import file_exists
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return file_exists(repo_id, filename, **kwargs)
    except (HfHubHTTPError, HFValidationError, OSError):
        return None
