"""Adapters on a model without a PeftModel around it; this is what transformers and diffusers call."""

import torch

from peft import registry
from peft.core import match
from peft.core.checkpoint import get_peft_model_state_dict, set_peft_model_state_dict
from peft.core.layer import AdapterLayer
from peft.core.wrappers import AuxiliaryTrainingWrapper

__all__ = [
    "cast_adapter_dtype",
    "delete_adapter",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "set_adapter",
    "set_peft_model_state_dict",
    "set_requires_grad",
]


def inject_adapter_in_model(
    peft_config, model, adapter_name="default", low_cpu_mem_usage=False, state_dict=None, **kwargs
):
    """Give the layers of `model` an adapter in place, make it the active one, and return the model.

    state_dict: an adapter file's tensors; the layers that its keys name are adapted. low_cpu_mem_usage: adapter weights
    on the meta device. Raises ValueError for methods that adapt the model's inputs and so need a PeftModel.
    """
    if peft_config.is_prompt_learning or peft_config.is_adaption_prompt:
        raise ValueError(
            "Prompt methods cannot be injected, as they adapt the inputs and not the layers; use get_peft_model."
        )
    if peft_config.peft_type not in registry.PEFT_TYPE_TO_TUNER_MAPPING:
        raise ValueError(f"{peft_config.peft_type} adapters cannot be injected; use get_peft_model.")
    tuner_cls = registry.method(peft_config.peft_type).tuner
    if not tuner_cls.injectable or tuner_cls.layer_cls.adapter_cls.shared_fields:
        raise ValueError(
            f"{peft_config.peft_type} adapters have more than what is in the layers, which a PeftModel must hold; use "
            "get_peft_model."
        )
    tuner = tuner_cls(model, peft_config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict)
    return tuner.model


def holders(model):
    """All adapted layers and auxiliary wrappers below a module."""
    found = []
    for _, _, module in [("", "", model), *match.walk(model)]:
        while isinstance(module, AdapterLayer):
            found.append(module)
            module = module.base_layer
        if isinstance(module, AuxiliaryTrainingWrapper):
            found.append(module)
    return found


def set_adapter(model, adapter_name, inference_mode=False, layer_cls=None):
    """Let one adapter, or a list of them, act in all layers of a model."""
    for holder in holders(model):
        if layer_cls is None or isinstance(holder, (layer_cls, AuxiliaryTrainingWrapper)):
            holder.set_adapter(adapter_name, inference_mode=inference_mode)


def delete_adapter(model, adapter_name, prefix=None, layer_cls=None):
    """Remove an adapter from all layers of a model; returns the names that are active now, or None if none is left.

    Layers that are left without any adapter keep their wrapper, so that later adapters find it.
    """
    touched = holders(model)
    for holder in touched:
        if layer_cls is None or isinstance(holder, (layer_cls, AuxiliaryTrainingWrapper)):
            holder.delete_adapter(adapter_name)
    remaining = {n: None for h in touched if isinstance(h, AdapterLayer) for n in h.adapters}
    active = None
    for holder in touched:
        state = holder.state
        if adapter_name in state.active:
            left = tuple(n for n in state.active if n != adapter_name)
            state.active = left or tuple(remaining)[:1]
        active = list(state.active)
    return active or None


def set_requires_grad(model, adapter_names, requires_grad=True):
    """Train adapters, or freeze them, in all layers of a model."""
    for holder in holders(model):
        holder.set_requires_grad(adapter_names, requires_grad)


def cast_adapter_dtype(model, adapter_name, autocast_adapter_dtype=True):
    """Make the float16 and bfloat16 weights of an adapter float32."""
    if not autocast_adapter_dtype:
        return
    for holder in holders(model):
        adapter = holder.adapters.get(adapter_name) if isinstance(holder, AdapterLayer) else None
        for p in adapter.parameters(frozen=True) if adapter is not None else ():
            if p.dtype in (torch.float16, torch.bfloat16):
                p.data = p.data.float()
