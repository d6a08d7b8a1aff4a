"""Any module, replaced whole: the active adapter's own copy acts in its place, so there is one at a time."""

import torch
from torch import nn

from peft.errors import AdapterError, MergeError
from peft.layers.kind import Kind


class Whole(Kind):
    """A module with whatever parameters and submodules it has; methods choose this kind, no base type does."""

    name = "whole"
    composes = False

    @staticmethod
    def owns(base):
        return True

    def shape(self, base):
        """As if it were one column of all its numbers."""
        return sum(owner[name].numel() for owner, name in places(base).values()), 1

    def placement(self, base, backend):
        first = next(base.parameters(), torch.empty(0))
        return first.device, first.dtype

    def pristine(self, layer):
        """{path: tensor} of the base module, also while merged."""
        if layer.merged:
            return layer._undo[0][1]
        return {path: owner[name] for path, (owner, name) in places(layer.get_base_layer()).items()}

    def call(self, layer, active, x, *args, **kwargs):
        if not active:
            return self.plain(layer, x, *args, **kwargs)
        if len(active) > 1 or layer.merged:
            names = [*layer.merged_adapters, *(a.name for a in active)]
            raise AdapterError(f"Only one adapter can take the place of {active[0].key}, but {names} are to act.")
        return active[0].module()(x, *args, **kwargs)

    def mixed(self, layer, plan, x, *args, **kwargs):
        y = layer.base_layer(x, *args, **kwargs)
        if args or kwargs or not isinstance(y, torch.Tensor):
            raise AdapterError(
                f"adapter_names cannot choose an adapter per sample here: {type(layer.get_base_layer()).__name__} has "
                "more inputs or outputs than one tensor. Run one batch per adapter."
            )
        out = y.clone()
        for name, rows in plan.rows.items():
            out[rows] = layer.adapters[name].module()(x[rows])
        return out

    def merge(self, layer, adapter, safe_merge):
        if layer.merged:
            raise AdapterError(
                f"{layer.merged_adapters[0]!r} is merged into {adapter.key}, and only one adapter can take its place. "
                "Unmerge it first."
            )
        new, old = places(adapter.module()), self.pristine(layer)
        broken = [path for path, (owner, name) in new.items() if not owner[name].isfinite().all()]
        if any(safe_merge or old[path].isfinite().all() for path in broken):
            raise MergeError(
                f"NaNs detected in the merged weights. The adapter {adapter.name} seems to be broken: its copy of "
                f"{adapter.key} has values that are not finite."
            )
        for path, (owner, name) in places(layer.get_base_layer()).items():
            source, key = new[path]
            value = source[key].detach().to(old[path].dtype, copy=True)
            is_parameter = isinstance(old[path], nn.Parameter)
            owner[name] = nn.Parameter(value, old[path].requires_grad) if is_parameter else value
        return old, None

    def unmerge(self, layer, packed, bias):
        for path, (owner, name) in places(layer.get_base_layer()).items():
            owner[name] = packed[path]


def places(module):
    """{path: (dict, name)} of the parameters and saved buffers of a module; the tensor is `dict[name]`."""
    found = {}
    for path, m in module.named_modules():
        for owner in (m._parameters, m._buffers):
            for name, t in owner.items():
                if t is not None and name not in m._non_persistent_buffers_set:
                    found[f"{path}.{name}" if path else name] = owner, name
    return found
