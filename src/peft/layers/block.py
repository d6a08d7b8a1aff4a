"""Whole blocks of a model and parts of them, for methods that change the hidden states between them."""

import torch
from torch import nn

from peft.layers.kind import Kind


class Block(Kind):
    """A module from hidden states (and more) to hidden states, or to a tuple that begins with them.

    Methods choose this kind, no base type does. It has no one weight, so nothing can be merged into it.
    """

    name = "block"
    elsewhere = None  # (device, dtype) of the model, for modules that have no parameters

    @staticmethod
    def owns(base):
        return True

    def shape(self, base):
        """As if it were one column of all its numbers."""
        return sum(p.numel() for p in base.parameters()), 1

    def placement(self, base, backend):
        first = next((p for p in base.parameters() if p.is_floating_point()), None)
        if first is not None:
            return first.device, first.dtype
        if backend.name:  # a quantized layer that holds nothing but codes
            return backend.placement(base, "weight")
        return self.elsewhere or (torch.device("cpu"), torch.get_default_dtype())

    def call(self, layer, active, x, *args, **kwargs):
        for a in reversed(active):
            x = a.input(x)
        hidden, whole = self.parted(self.plain(layer, x, *args, **kwargs))
        for a in active:
            hidden = a.output(x, hidden)
        return whole(hidden)

    def parted(self, returned):
        if isinstance(returned, tuple):
            return returned[0], lambda y: (y, *returned[1:])
        return returned, lambda y: y

    def merge(self, layer, adapter, safe_merge):
        return adapter.merged_weight(None)


class Sublayer(Block):
    """Any module whose output (or its first part) is (samples, ..., width): a norm, an embedding, a block or a part.

    Methods choose this kind for what no other kind of theirs owns. Adapters act on each sample by itself.
    """

    name = "sublayer"

    @staticmethod
    def owns(base):
        return not isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d))

    def shape(self, base):
        """(width, width), as the module itself says; (0, 0) where it does not."""
        return (width_of(base),) * 2


def output_width(layer, told):
    """The last dimension of an adapted layer's output; `told` where that is a part of a model which does not say it."""
    unknown = layer.kind.name == Sublayer.name and not own_width(layer.get_base_layer())
    return told if told and unknown else layer.shape[0]


def width_of(base):
    """The last dimension of a module's output: its own, or that of its norms or its last linear layer; 0: unknown."""
    norms = [module for module in reversed(list(base.children())) if own_width(module) and not _linear_width(module)]
    for module in (base, *norms, *reversed(list(base.modules()))):
        if width := own_width(module):
            return width
    return 0


def own_width(module):
    """The last dimension of the output of a norm, an embedding or a linear layer; 0 for anything else."""
    weight = getattr(module, "weight", None)
    return weight.numel() if getattr(weight, "ndim", 0) == 1 else _linear_width(module)


def _linear_width(module):
    return next((getattr(module, n) for n in ("out_features", "nf", "embedding_dim") if hasattr(module, n)), 0)
