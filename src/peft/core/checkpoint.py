"""An adapter as a dict of tensors, out of a model and into one; every tensor and every place is accounted for."""

import warnings
from collections import namedtuple

import torch

from peft.core import biases, match
from peft.core.layer import AdapterLayer
from peft.core.slots import PREFIX, adapter_slots, base_slots, registry_of, tuner_parts
from peft.core.wrappers import AuxiliaryTrainingWrapper
from peft.errors import AdapterMismatchError, CheckpointError, PeftWarning, nearest
from peft.ops.finite import keys_not_finite
from peft.storage import hub
from peft.storage.files import read_json

EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
LoadResult = namedtuple("LoadResult", ["missing_keys", "unexpected_keys", "mismatched_keys"])


def get_peft_model_state_dict(
    model, state_dict=None, adapter_name="default", unwrap_compiled=False, save_embedding_layers="auto"
):
    """The tensors of one adapter under their names in a file.

    state_dict: take values from this one, gathered from a sharded model, instead of the model's own tensors.
    unwrap_compiled: look below torch.compile's wrapper. save_embedding_layers: "auto" saves embeddings and head of
    the base where they are targeted or were resized; True or False decides.
    """
    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    _, base, configs = tuner_parts(model)
    config = configs[adapter_name]
    if config.is_prompt_learning:
        tensors = model.prompt_tables(adapter_name)
        slots = adapter_slots(model, adapter_name)
    else:
        tensors, slots = {}, adapter_slots(model, adapter_name)
        slots += biases.slots_of(model, config, slots, adapter_name)
    for slot in slots:
        tensors[slot.file_key] = _value(slot, state_dict)
    for adapter_cls in _methods(model, base, adapter_name):
        tensors = adapter_cls.to_file(config, tensors)
    for slot in _embedding_slots(model, base, config, save_embedding_layers):
        tensors.setdefault(slot.key, _value(slot, state_dict))
    return tensors


def _methods(model, base, name):
    """{adapter class: adapters called `name`} of a model."""
    found = {}
    for layer in registry_of(model, base)[0].values():
        if name in layer.adapters:
            found.setdefault(type(layer.adapters[name]), []).append(layer.adapters[name])
    return found


def _value(slot, state_dict):
    if state_dict is None:
        return slot.tensor.detach()
    if slot.key in state_dict:
        return state_dict[slot.key]
    compiled = {k.replace("_orig_mod.", "").replace("_fsdp_wrapped_module.", ""): v for k, v in state_dict.items()}
    return compiled.get(slot.key, slot.tensor.detach())


def _embedding_slots(model, base, config, wanted):
    """Slots of the base's embeddings and head, where they go into the file."""
    if not hasattr(base, "get_input_embeddings"):
        if wanted is True:
            warnings.warn("save_embedding_layers=True has no effect: this model names no embedding.", stacklevel=4)
        return []
    if wanted == "auto":
        targets = getattr(config, "target_modules", None)
        targeted = isinstance(targets, str) and any(match.Names(targets).match(k) for k in EMBEDDING_LAYER_NAMES)
        targeted |= not isinstance(targets, str) and any(
            t.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for t in targets or ()
        )
        if targeted:
            warnings.warn("The base's embedding goes into the file, because target_modules names it.", stacklevel=4)
        wanted = targeted or _resized(base, config)
    else:
        targeted = False
    if not wanted:
        return []
    ends, slots = set(), base_slots(model)
    for get in (base.get_input_embeddings, base.get_output_embeddings):
        try:
            module = get()
        except (NotImplementedError, AttributeError):
            continue
        if isinstance(module, AuxiliaryTrainingWrapper):
            continue  # its trained copy or rows are in the file already
        if targeted and not isinstance(module, AdapterLayer):
            continue
        while isinstance(module, AdapterLayer):
            module = module.base_layer
        ends |= {id(p) for p in module.parameters()} if module is not None else set()
    return [s for s in slots.values() if id(s.tensor) in ends]


def _resized(base, config):
    """Whether the vocabulary is not the one that the base model was published with. Never asks the network."""
    size = getattr(getattr(base, "config", None), "vocab_size", None)
    origin = config.base_model_name_or_path
    if size is None or not origin:
        return False
    path = hub.cached_file(origin, "config.json", revision=getattr(config, "revision", None))
    if path is None:
        return False
    before = read_json(path).get("vocab_size")
    if before is not None and before != size:
        warnings.warn(
            "Setting `save_embedding_layers` to `True` as the embedding layer has been resized during finetuning.",
            stacklevel=4,
        )
        return True
    return False


def set_peft_model_state_dict(
    model,
    peft_model_state_dict,
    adapter_name="default",
    ignore_mismatched_sizes=False,
    low_cpu_mem_usage=False,
    strict=False,
):
    """Put the tensors of a file into the adapter's places; returns LoadResult(missing, unexpected, mismatched keys).

    Nothing is changed unless everything checks out. Raises AdapterMismatchError where no tensor fits, where shapes
    differ (unless ignore_mismatched_sizes) or, with strict=True, where any tensor or place is left over;
    CheckpointError where a tensor is not finite or would overwrite the base model.
    low_cpu_mem_usage: take the tensors themselves instead of copying their values.
    """
    config = tuner_parts(model)[2][adapter_name]
    tensors = dict(peft_model_state_dict)
    prompt = {k: tensors.pop(k) for k in list(tensors) if "." not in k} if config.is_prompt_learning else None
    for adapter_cls, adapters in _methods(model, tuner_parts(model)[1], adapter_name).items():
        tensors = adapter_cls.from_file(config, tensors, adapters)
    slots = {s.file_key: s for s in adapter_slots(model, adapter_name)}
    tensors = _without_alien_prefix(tensors, slots, tuner_parts(model)[0])
    extra = [k for k in tensors if k not in slots]
    base = _allowed_base_slots(model, config, extra) if extra else {}
    places = {**slots, **base}
    unexpected = [k for k in extra if k not in base]
    missing = [k for k in slots if k not in tensors]
    mismatched = [k for k, s in places.items() if k in tensors and tuple(tensors[k].shape) != tuple(s.tensor.shape)]
    _check(adapter_name, tensors, slots, missing, unexpected, strict and not config.is_prompt_learning)
    if mismatched:
        lines = [f"  {k}: file {tuple(tensors[k].shape)}, model {tuple(places[k].tensor.shape)}" for k in mismatched]
        if not ignore_mismatched_sizes:
            raise AdapterMismatchError(
                "Error(s) in loading state_dict: size mismatch for\n" + "\n".join(lines) + "\nThe file was made with "
                "other settings or for another model; load it with its own config, or pass "
                "ignore_mismatched_sizes=True to leave these at their initial values."
            )
        warnings.warn("Some weights were not loaded because their shapes differ:\n" + "\n".join(lines), stacklevel=2)
    if config.is_prompt_learning:
        model.load_prompt(adapter_name, prompt, ignore_mismatched_sizes)
    for key, slot in places.items():
        if key in tensors and key not in mismatched and slot.owner is not None:
            fill(slot, tensors[key], take=low_cpu_mem_usage)
    return LoadResult([slots[k].key for k in missing], unexpected, mismatched)


def fill(slot, value, take=False):
    """Write a value into its place; `take` or a place on the meta device: the tensor itself becomes the parameter."""
    old = slot.owner[slot.name]
    if not (take or old.is_meta):
        with torch.no_grad():
            old.copy_(value)
        return
    device = (slot.device or value.device) if old.is_meta else old.device
    slot.replace(value.detach().to(dtype=old.dtype, device=device))


def _without_alien_prefix(tensors, slots, prefix):
    """Keys with or without `base_model.model.`, whichever the model has."""
    if not prefix:
        return {k.removeprefix(PREFIX) if k.removeprefix(PREFIX) in slots else k: v for k, v in tensors.items()}
    return tensors


def _allowed_base_slots(model, config, keys):
    """{key: slot} of base tensors that a file may set: biases if trained, embeddings and head. Others raise."""
    slots = base_slots(model)
    aliases = {k.replace(".base_layer.", "."): k for k in slots}
    allowed, forbidden = {}, []
    for key in keys:
        live = key if key in slots else aliases.get(key)
        if live is None:
            continue
        *path, name = [p for p in live.split(".") if p not in ("base_layer", "original_module")]
        is_bias = name.endswith("bias") and getattr(config, "bias", "none") != "none"
        if is_bias or (path and path[-1] in EMBEDDING_LAYER_NAMES) or _is_embedding(model, slots[live]):
            allowed[key] = slots[live]
        else:
            forbidden.append(key)
    if forbidden:
        raise CheckpointError(
            f"The adapter file would overwrite {len(forbidden)} tensors of the base model, for example "
            f"{forbidden[0]!r}. An adapter holds none; nothing was loaded. If you trust the file, remove these keys."
        )
    return allowed


def _is_embedding(model, slot):
    base = tuner_parts(model)[1]
    if not hasattr(base, "get_input_embeddings"):
        return False
    try:
        modules = [base.get_input_embeddings(), base.get_output_embeddings()]
    except (NotImplementedError, AttributeError):
        return False
    return any(slot.tensor is getattr(m, "weight", None) for m in modules if m is not None)


def _check(name, tensors, slots, missing, unexpected, strict):
    """Raise for files that do nothing, are damaged, or (strict) fit only in part."""
    if slots and tensors and len(missing) == len(slots):
        key = next(iter(unexpected), next(iter(tensors)))
        raise AdapterMismatchError(
            f"None of the {len(tensors)} tensors in the file fits adapter {name!r}: it would compute exactly what the "
            f"base model does. The file has {key!r}; nearest in the model: {nearest(key, slots)}. Rename the keys with "
            "key_mapping={'regex': 'replacement'}, or load the adapter on the model it was trained for."
        )
    if not tensors and slots:
        raise AdapterMismatchError(f"The file for adapter {name!r} holds no tensors; {len(slots)} were expected.")
    if wrong := [k for k in slots if k in tensors and not _same_sort(tensors[k], slots[k].tensor)]:
        raise CheckpointError(
            f"{len(wrong)} tensors of adapter {name!r}, for example {wrong[0]!r}, are {tensors[wrong[0]].dtype}; the "
            f"adapter needs {slots[wrong[0]].tensor.dtype}. Nothing was loaded."
        )
    if damaged := keys_not_finite(tensors):
        raise CheckpointError(
            f"{len(damaged)} tensors of adapter {name!r}, for example {damaged[0]!r}, have values that are not finite "
            "(NaN or infinite): the training that made it diverged, or the file is damaged. Nothing was loaded."
        )
    if strict and (missing or unexpected):
        raise AdapterMismatchError(
            f"Adapter {name!r} fits only in part. Missing in the file: {missing[:5]}{'...' * (len(missing) > 5)}; "
            f"unknown to the model: {unexpected[:5]}{'...' * (len(unexpected) > 5)}. Nothing was loaded."
        )


def _same_sort(a, b):
    """Whether one dtype can stand for another: both are real floats, or neither is."""
    return a.is_floating_point() == b.is_floating_point() and a.is_complex() == b.is_complex()


def warn_about(result, adapter_name):
    """Warn where a load left tensors or places over."""
    if result.missing_keys:
        warnings.warn(
            f"Found missing adapter keys while loading the checkpoint: {result.missing_keys}. These parts of "
            f"{adapter_name!r} stay as initialised; strict=True makes this an error.",
            PeftWarning,
            stacklevel=4,
        )
    if result.unexpected_keys:
        warnings.warn(
            f"Found unexpected keys in the checkpoint, which were ignored: {result.unexpected_keys}. "
            "strict=True makes this an error.",
            PeftWarning,
            stacklevel=4,
        )


def get_base_model_state_dict(model):
    """The base model's tensors under the names they have without adapters."""
    prefix = tuner_parts(model)[0]
    return {base_key(k, prefix): s.tensor.detach() for k, s in base_slots(model).items()}


def set_base_model_state_dict(model, state_dict, strict=True):
    """Put tensors, named as without adapters, into the base model. strict: RuntimeError for leftovers."""
    prefix = tuner_parts(model)[0]
    slots = {base_key(k, prefix): s for k, s in base_slots(model).items()}
    missing = [k for k in slots if k not in state_dict]
    unexpected = [k for k in state_dict if k not in slots]
    if strict and (missing or unexpected):
        raise RuntimeError(f"The state_dict does not fit the base model: missing {missing}, unexpected {unexpected}.")
    for key, slot in slots.items():
        if key in state_dict and slot.owner is not None:
            fill(slot, state_dict[key])
        elif key in state_dict and not torch.equal(slot.tensor, state_dict[key]):
            raise RuntimeError(f"{key} belongs to a quantized weight, which can only be loaded with its whole layer.")
    return LoadResult(missing, unexpected, [])


def base_key(key, prefix):
    """A base tensor's key without what wrapping added."""
    parts = key.removeprefix(prefix).split(".")
    return ".".join(p for p in parts if p not in ("base_layer", "original_module", "token_adapter"))
