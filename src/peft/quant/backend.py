"""The contract of a weight storage, and its plain form: float parameters."""

import sys

import torch
from torch import nn

from peft.errors import MergeError


def loaded(module, *names):
    """These classes of a module, as a tuple; () where nobody has imported it: then nothing is an instance of them."""
    found = sys.modules.get(module)
    return tuple(cls for name in names if (cls := getattr(found, name, None)) is not None)


def unwritable(what, why):
    """The error for a merge into a weight that nothing can quantize again."""
    return MergeError(
        f"{what} cannot take a merged weight: {why}. Merge into float weights instead, with merge_and_unload("
        'target="dequantized") into those that it stands for, or target="original" into those of the unquantized '
        "model; or use the adapter unmerged."
    )


class Plain:
    """Float weights. A quantized backend overrides `owns`, `unpack`, `pack` and, if need be, `get` and `put`.

    `packed` is whatever `get` returns; `pack` builds a new one and never changes the old, so putting the old one
    back undoes a merge exactly.
    """

    name = ""  # "" means float
    lossy = False  # True: what `pack` makes of a weight rounds it, so that a merge may lose a small update
    hooks: tuple = ()  # forward hooks of ours on `base`, with which it still is nothing but its matrix product

    @staticmethod
    def owns(base):
        return True

    @property
    def storage(self):
        """What files say of a base with such weights: "float", or whatever else rounds them."""
        return self.name or "float"

    def get(self, base, param):
        """The stored weight, as `put` takes it back."""
        packed = base._parameters.get(param, None)
        packed = getattr(base, param) if packed is None else packed
        if packed.is_meta:
            raise MergeError(
                f"The weight of {type(base).__name__} is on the meta device (offloaded or not loaded yet). "
                "Load the base model onto a real device before merging or initialising from its weights."
            )
        return packed

    def put(self, base, param, packed):
        """Make `packed` the stored weight. A new Parameter object, so weights tied to the old one stay as they are."""
        base._parameters[param] = packed

    def unpack(self, base, packed):
        """The weight as a float tensor in storage layout. Raises MergeError for one that only its library can read."""
        if not packed.is_floating_point():
            raise MergeError(
                f"A weight stored as {packed.dtype} cannot be read: this version of peft knows no backend for it. "
                "Load the base model unquantized to merge, or to initialise from its weights."
            )
        return packed.detach()

    def pack(self, base, W, old):
        """A stored weight with the values W, in the manner of `old`."""
        return nn.Parameter(W.to(old.dtype).contiguous(), requires_grad=old.requires_grad)

    def placement(self, base, param):
        """(device, dtype) for new adapter tensors."""
        p = getattr(base, param)
        return p.device, p.dtype if p.dtype.is_floating_point else torch.get_default_dtype()

    def guard(self, y):
        """The base layer's output, safe to be built on."""
        return y

    def attach(self, base):
        """Called when a model with this layer gets adapters, perhaps more than once."""

    def detach(self, base):
        """Undo `attach`; called when the model has no adapters any more."""

    def maker(self, base, x):
        """A function that makes the float weight with which the layer would multiply x, (out, in), or None.

        The result is used once and dropped; the fused operations call it in the forward and again in the backward pass.
        None: only the library's own forward is right, or better, for this layer and input.
        """
        return None


PLAIN = Plain()
