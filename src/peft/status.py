"""What is adapted, active, merged and trained: per layer and for the whole model."""

from dataclasses import dataclass
from typing import Literal

from peft.core import match
from peft.core.layer import AdapterLayer


@dataclass
class TunerLayerStatus:
    """The state of one adapted layer."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Literal["irregular"]]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


@dataclass
class TunerModelStatus:
    """The state of a model; "irregular" where its layers disagree."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Literal["irregular"]
    active_adapters: list[str] | Literal["irregular"]
    merged_adapters: list[str] | Literal["irregular"]
    requires_grad: dict[str, bool | Literal["irregular"]]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


def _base_of(model):
    """The base model with adapted layers in it. Raises TypeError where there can be none."""
    from peft.core.tuner import Tuner
    from peft.model import PeftModel

    if isinstance(model, PeftModel):
        if model._is_prompt_learning:
            raise TypeError("get_layer_status() is not supported for prompt learning models; they adapt no layers.")
        return model.base_model.model
    if type(model).__name__ == "PeftMixedModel":
        raise TypeError("get_layer_status is not supported for PeftMixedModel.")
    return model.model if isinstance(model, Tuner) else model


def get_layer_status(model):
    """One TunerLayerStatus for each adapted layer. Raises TypeError for prompt methods and mixed models."""
    base = _base_of(model)
    wrapped = base is not model
    found = []
    for _, path, module in match.walk(base):
        while isinstance(module, AdapterLayer):
            found.append(_layer_status(f"model.{path}" if wrapped else path, module))
            module, path = module.base_layer, f"{path}.base_layer"
    if not found:
        raise ValueError(
            f"{type(base).__name__} has no adapter layers. Wrap it with get_peft_model or inject an adapter first."
        )
    return found


def _layer_status(name, layer):
    grads, devices = {}, {}
    for adapter_name, adapter in layer.adapters.items():
        parameters = list(adapter.parameters())
        flags = {p.requires_grad for p in parameters}
        grads[adapter_name] = flags.pop() if len(flags) == 1 else "irregular"
        devices[adapter_name] = sorted({p.device.type for p in parameters})
    return TunerLayerStatus(
        name=name,
        module_type=layer._get_name(),
        enabled=not layer.disable_adapters,
        active_adapters=layer.active_adapters,
        merged_adapters=layer.merged_adapters,
        requires_grad=dict(sorted(grads.items())),
        available_adapters=sorted(layer.adapters),
        devices=devices,
        quantization_backend=layer.backend.name or None,
    )


def get_model_status(model):
    """A TunerModelStatus. Raises TypeError for prompt methods and mixed models, ValueError without adapters."""
    from peft.core.tuner import Tuner
    from peft.model import PeftModel

    base = _base_of(model)
    layers = get_layer_status(model)
    if isinstance(model, PeftModel):
        trainable, total = model.get_nb_trainable_parameters()
        tuner_name = type(model.base_model).__name__
    else:
        parameters = list(model.parameters())
        trainable, total = sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
        tuner_name = type(model).__name__ if isinstance(model, Tuner) else "None"
    names = sorted({n for s in layers for n in s.available_adapters})
    merged_somewhere = sorted({n for s in layers for n in s.merged_adapters})
    consistent = all(set(s.merged_adapters) == set(merged_somewhere) & set(s.available_adapters) for s in layers)
    return TunerModelStatus(
        base_model_type=type(base).__name__,
        adapter_model_type=tuner_name,
        peft_types={
            n: str(getattr(c.peft_type, "value", c.peft_type)) for n, c in getattr(model, "peft_config", {}).items()
        },
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_agreed([s.enabled for s in layers]),
        active_adapters=_agreed([s.active_adapters for s in layers]),
        merged_adapters=merged_somewhere if consistent else "irregular",
        requires_grad={n: _agreed([s.requires_grad[n] for s in layers if n in s.requires_grad]) for n in names},
        available_adapters=names,
        devices={n: sorted({d for s in layers for d in s.devices.get(n, ())}) for n in names},
        quantization_backend=_agreed([s.quantization_backend for s in layers]),
    )


def _agreed(values):
    return values[0] if all(v == values[0] for v in values) else "irregular"
