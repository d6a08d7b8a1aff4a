"""The tensors of a whole model, of an adapter and of the base, as slots; and the wrappers that hold them."""

from torch import nn

from peft.core import match
from peft.core.fields import Slot, module_slots
from peft.core.layer import AdapterLayer
from peft.core.wrappers import AuxiliaryTrainingWrapper

PREFIX = "base_model.model."  # how file keys of a wrapped model begin


def tuner_parts(model):
    """(key prefix, base model, config dict) of a PeftModel, a tuner, or a model with injected adapters."""
    if "base_model" in model._modules:  # PeftModel
        inner = model._modules["base_model"]
        if "model" in inner._modules and hasattr(inner, "layers") and hasattr(inner, "extras"):
            return PREFIX, inner.model, model.peft_config
        return "base_model.", inner, model.peft_config
    if hasattr(type(model), "own_slots"):
        return "model.", model.model, model.peft_config
    return "", model, getattr(model, "peft_config", {})


def tuner_of(model):
    """The tuner of a PeftModel, or the model itself if it is one, or None."""
    tuner = model._modules.get("base_model", model)
    return tuner if hasattr(type(tuner), "own_slots") else None


def adapter_slots(model, adapter_name):
    """The `Slot`s of everything that a file holds of one adapter; `key` and `file_key` are full."""
    prefix, base, _ = tuner_parts(model)
    layers, extras = registry_of(model, base)
    slots, tuner = [], tuner_of(model)
    for path, layer in layers.items():
        if (adapter := layer.adapters.get(adapter_name)) is None:
            continue
        device = layer.placement()["device"]
        file_path = path if tuner is None else tuner.file_path(path)
        for slot in adapter.saved_slots():
            slot.device = device
            slot.file_key = f"{prefix}{file_path}.{adapter.file_key(slot.key, adapter_name)}"
            slot.key = f"{prefix}{path}.{slot.key}"
            slots.append(slot)
    if tuner is not None:
        above = prefix.removesuffix("model.")
        for slot in tuner.own_slots(adapter_name):
            slot.file_key, slot.key = above + slot.file_key, above + slot.key
            slots.append(slot)
    for path, wrapper in extras.items():
        if adapter_name not in wrapper.adapter_names:
            continue
        device = next((p.device for p in wrapper.original_module.parameters()), None)
        for slot in wrapper.saved_slots(adapter_name):
            slot.device = device
            slot.file_key, slot.key = f"{prefix}{path}.{slot.file_key}", f"{prefix}{path}.{slot.key}"
            slots.append(slot)
    return slots


def registry_of(model, base):
    """({path: AdapterLayer}, {path: wrapper}): the tuner's registry, or, without a tuner, from a walk of the model."""
    if (tuner := tuner_of(model)) is not None:
        return tuner.layers, tuner.extras
    return wrappers_in(base)


def wrappers_in(model):
    """({path: AdapterLayer}, {path: AuxiliaryTrainingWrapper}) of a model's module tree; new dicts at each call."""
    layers, extras = {}, {}
    for _, path, module in match.walk(model):
        while isinstance(module, AdapterLayer):
            layers[path] = module
            module, path = module._modules["base_layer"], f"{path}.base_layer"
        if isinstance(module, AuxiliaryTrainingWrapper):
            extras[path] = module
    return layers, extras


def base_slots(model):
    """{key: Slot} of the base model's own tensors, as they stand in the wrapped model."""
    prefix, base, _ = tuner_parts(model)
    slots = {}
    seen = [("", "", base), *match.walk(base)]
    for _, path, module in seen:
        while isinstance(module, AdapterLayer):
            module, path = module._modules["base_layer"], f"{path}.base_layer"
        if isinstance(module, AuxiliaryTrainingWrapper):
            path = (
                f"{path}.original_module"
                if "original_module" in module._modules
                else f"{path}.token_adapter.base_layer"
            )
            for slot in module_slots(module.original_module, f"{prefix}{path}."):
                slot.file_key = slot.key
                slots[slot.key] = slot
            continue
        start = f"{prefix}{path}." if path else prefix
        beside = {}  # scales and the like, which a quantized layer computes for its state_dict
        if not module._modules and type(module)._save_to_state_dict is not nn.Module._save_to_state_dict:
            beside = {start + k: Slot(start + k, t, file_key=start + k) for k, t in module.state_dict().items()}
        for owner in (module._parameters, module._buffers):
            for name, t in owner.items():
                if t is not None and name not in module._non_persistent_buffers_set:
                    slots[start + name] = Slot(start + name, t, owner, name, start + name)
        slots.update((k, slot) for k, slot in beside.items() if k not in slots)
    return slots
