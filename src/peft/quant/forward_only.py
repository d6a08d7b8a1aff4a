"""Weights that their library can read but not write: adapters act beside them, and merge into float weights only."""

import copy

import torch

from peft.quant.backend import unwritable
from peft.quant.straight import Carried

ROWS = 1024  # of the identity that a kernel gets at once


class ForwardOnly(Carried):
    """Says where a layer keeps its codes and scales. `unpack` asks the kernel, unless the format is documented.

    Packed: the tensor of codes, for nobody replaces it.
    """

    lossy = True
    title = ""  # of the format, in messages
    codes, scales = "qweight", "scales"

    def get(self, base, param):
        return super().get(base, self.codes)

    def unpack(self, base, packed):
        return kernel_weight(base, self.inputs(base), *self.placement(base, "weight"))

    def inputs(self, base):
        """The width of x."""
        return base.in_features

    def pack(self, base, W, old):
        raise unwritable(type(base).__name__, f"{self.title} weights are made by their own tools from a whole model")

    def placement(self, base, param):
        device, dtype = getattr(base, self.codes).device, getattr(base, self.scales).dtype
        return device, dtype if dtype.is_floating_point else torch.get_default_dtype()


@torch.no_grad()
def kernel_weight(base, inputs, device, dtype):
    """The weight (out, in) that a layer multiplies by: what its forward, without bias, makes of the identity."""
    bare = copy.copy(base)
    for place in ("_parameters", "_buffers"):
        bare.__dict__[place] = {n: None if n == "bias" else t for n, t in base.__dict__[place].items()}
    if "bias" in base.__dict__:
        bare.__dict__["bias"] = None
    columns = torch.arange(inputs, device=device)
    made = []
    for rows in columns.split(ROWS):
        made.append(type(base).forward(bare, (rows[:, None] == columns).to(dtype)))  # without hooks
    return torch.cat(made).T.to(dtype)
