"""Tensors that all layers of an adapter share: the tuner holds them, layers refer to its dict (VeRA and its kin)."""

import torch

from peft.core.fields import entry_slots


@torch.no_grad()
def make(tuner, name, config, layers, autocast):
    """Ask the method for an adapter's shared entries. layers: {key: AdapterLayer} that the adapter will be on."""
    if not layers:
        return
    adapter_cls = tuner.layer_cls.adapter_cls
    where = next(iter(layers.values())).placement(autocast)
    for field_name, value in adapter_cls.share(config, layers, where).items():
        field = adapter_cls.fields[field_name]
        if field_name not in tuner.shared:
            tuner.shared[field_name] = {} if field.container is None else field.container()
        tuner.shared[field_name][name] = value
        if field.container is not None:
            tuner._modules[field_name] = tuner.shared[field_name]


def slots(tuner, name):
    """The slots of what a file holds of an adapter's shared tensors; keys and file keys are relative to the tuner."""
    adapter_cls = tuner.layer_cls.adapter_cls
    left_out = adapter_cls.unsaved(tuner.peft_config[name])
    found = [
        slot
        for field in adapter_cls.shared_fields
        if adapter_cls.fields[field].saved and field not in left_out and field in tuner._modules
        for slot in entry_slots(tuner._modules[field], field, name)
    ]
    for slot in found:
        slot.file_key = adapter_cls.file_key(slot.key, name)
    return found


def drop(tuner, name):
    """Take away what an adapter's layers shared."""
    for field, entries in list(tuner.shared.items()):
        if name in entries:
            del entries[name]
        if not len(entries):
            del tuner.shared[field]
            tuner._modules.pop(field, None)
