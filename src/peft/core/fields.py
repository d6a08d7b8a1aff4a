"""Where an adapter's tensors lie: fields on the layer, and the slots by which files reach them.

Tensors live on the layer, parameter-major (`layer.lora_A["default"]`), because that is the checkpoint layout;
fields give the author the adapter-major view (`self.lora_A`).
"""

from dataclasses import dataclass

import torch
from torch import nn


class Field:
    """One entry per adapter, stored on the layer: `layer.<field>[adapter]`. An entry that was never set reads as None.

    container: the class that holds the entries; None for plain Python values. entries: the dict inside it.
    shared: one entry per adapter of the whole model, held by the tuner and made by `Adapter.share`.
    """

    def __init__(self, container, entries, trainable, saved, shared=False):
        self.container, self.entries, self.trainable, self.saved = container, entries, trainable, saved
        self.shared = shared

    def __set_name__(self, owner, name):
        self.name = name

    def __get__(self, adapter, owner=None):
        if adapter is None:
            return self
        layer = adapter.layer
        if self.shared:
            slots = layer.shared.get(self.name, {})
        elif self.container is None:
            return layer.__dict__[self.name].get(adapter.name)
        else:
            slots = layer._modules.get(self.name)
        if slots is None or self.container is None:
            return None if slots is None else slots.get(adapter.name)
        return getattr(slots, self.entries).get(adapter.name) if len(slots) else None

    def __set__(self, adapter, value):
        slots = self.slots(adapter.layer)
        if self.entries == "_modules":  # what ModuleDict checks on setting costs more than making the module
            slots._modules[adapter.name] = value
        else:
            slots[adapter.name] = value

    def slots(self, layer):
        """The container on the layer, made when it is first needed: empty ones would only slow every module walk."""
        if self.shared:
            return layer.shared[self.name]
        if self.container is None:
            return layer.__dict__[self.name]
        if self.name not in layer._modules:
            layer._modules[self.name] = self.container()
        return layer._modules[self.name]

    def slots_of(self, adapter):
        """The `Slot`s of one adapter's entry; their keys are relative to the layer."""
        if self.container is None or self.__get__(adapter) is None:
            return []
        return entry_slots(self.slots(adapter.layer), self.name, adapter.name)


@dataclass(slots=True)
class Slot:
    """A place in the model for one tensor of a checkpoint: `owner[name]`, under `key` in the model's state_dict."""

    key: str
    tensor: torch.Tensor
    owner: dict | None = None  # None: the tensor is computed, and a loader has nothing to fill
    name: str = ""
    file_key: str = ""
    device: torch.device | None = None  # where it belongs, for a tensor that is still on the meta device

    def replace(self, new):
        """Put another tensor into the place; a parameter stays one, trained or not as it was."""
        old = self.owner[self.name]
        self.owner[self.name] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


def entry_slots(container, field, name):
    """The slots of adapter `name`'s entry in a field's container."""
    if name not in container:
        return []
    if isinstance(container, nn.ModuleDict):
        return module_slots(container[name], f"{field}.{name}.")
    entries = container._buffers if isinstance(container, BufferDict) else container._parameters
    return [Slot(f"{field}.{name}", entries[name], entries, name)]


def module_slots(module, prefix=""):
    """The slots of all parameters and saved buffers of a module."""
    found = []
    for path, m in module.named_modules():
        path = f"{prefix}{path}." if path else prefix
        for owner in (m._parameters, m._buffers):
            for name, t in owner.items():
                if t is not None and name not in m._non_persistent_buffers_set:
                    found.append(Slot(f"{path}{name}", t, owner, name))
    return found


class BufferDict(nn.Module):
    """A dict of buffers, like nn.ParameterDict; with persistent=False they are in no state_dict."""

    def __init__(self, persistent=False):
        super().__init__()
        self.persistent = persistent

    def __setitem__(self, key, value):
        self.register_buffer(key, value, persistent=self.persistent)

    def __getitem__(self, key):
        return self._buffers[key]

    def __delitem__(self, key):
        del self._buffers[key]

    def __contains__(self, key):
        return key in self._buffers

    def __len__(self):
        return len(self._buffers)

    def __iter__(self):
        return iter(self._buffers)

    def keys(self):
        return self._buffers.keys()

    def values(self):
        return self._buffers.values()

    def items(self):
        return self._buffers.items()


class _Saved(BufferDict):
    """Tensors that are not trained but belong to the adapter all the same."""

    def __init__(self):
        super().__init__(persistent=True)


def Param(trainable=True, shared=False):
    """Field of trained tensors: `layer.<field>.<adapter>`."""
    return Field(nn.ParameterDict, "_parameters", trainable, saved=True, shared=shared)


def Mod(trainable=True, shared=False):
    """Field of submodules: `layer.<field>.<adapter>.weight`; trainable=False for ones without parameters."""
    return Field(nn.ModuleDict, "_modules", trainable, saved=trainable, shared=shared)


def Buf(shared=False):
    """Field of tensors that a file holds and nobody trains: indices, frozen projections."""
    return Field(_Saved, "_buffers", trainable=False, saved=True, shared=shared)


def Derived(shared=False):
    """Field of tensors that follow from the base weight or a seed, so that no file holds them."""
    return Field(BufferDict, "_buffers", trainable=False, saved=False, shared=shared)


def Val(shared=False):
    """Field of plain Python values: `layer.<field>[adapter]`."""
    return Field(None, None, trainable=False, saved=False, shared=shared)
