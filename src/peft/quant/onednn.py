"""float32 weights in the order that oneDNN's kernels read: nothing is rounded, and CPUs multiply a few rows faster.

torch multiplies float32 with MKL, which some processors run far below their best; oneDNN would first bring the weight
into its order for each product. A `PackedLinear` keeps it in that order, in place of the other one.
"""

import torch
from torch import nn

from peft.errors import AdapterError
from peft.ops.product import LINEARS
from peft.quant.straight import Carried

ROWS = 8  # of the products that the order is chosen for; it does for others as well


class PackedLinear(nn.Module):
    """A frozen nn.Linear: x (..., in) -> (..., out). packed: the weight (out, in), opaque but for `to_dense()`."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.register_buffer("packed", reordered(linear.weight.detach()), persistent=False)
        self.train(linear.training)

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), self.packed, self.bias, "none", [], "")

    def _apply(self, fn, recurse=True):
        dense = fn(self.packed.to_dense())
        if dense.dtype is not torch.float32 or dense.device.type != "cpu":
            raise TypeError(
                f"A PackedLinear holds float32 on the CPU, not {dense.dtype} on {dense.device}: convert or move the "
                "model first, then call pack_linears."
            )
        bias = self.bias
        if bias is not None:
            self.bias = nn.Parameter(fn(bias.detach()), requires_grad=bias.requires_grad)
        return self

    def __getstate__(self):
        state = self.__dict__.copy()
        state["_buffers"] = {**self._buffers, "packed": self.packed.to_dense()}
        return state

    def __setstate__(self, state):
        super().__setstate__(state)
        self._buffers["packed"] = reordered(self._buffers["packed"])

    def extra_repr(self):
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Packed(Carried):
    """packed: see PackedLinear. Reading and storing only changes the order, so a merge loses nothing."""

    name = "onednn"
    storage = "float"  # the same numbers

    @staticmethod
    def owns(base):
        return isinstance(base, PackedLinear)

    def get(self, base, param):
        return base.packed

    def put(self, base, param, packed):
        base.packed = packed

    def unpack(self, base, packed):
        return packed.to_dense()

    def pack(self, base, W, old):
        return reordered(W.float())

    def placement(self, base, param):
        return torch.device("cpu"), torch.float32


BACKENDS = [Packed]


def reordered(W):
    """W (out, in) in oneDNN's order."""
    return torch.ops.mkldnn._reorder_linear_weight(W.contiguous(), ROWS)


def pack_linears(model):
    """Replace the model's float32 nn.Linear layers on the CPU by `PackedLinear`, for inference; returns how many.

    Outputs differ by the rounding of a sum. A weight that another module shares (tied embeddings) is copied. Raises
    AdapterError where the model has adapters already, whose own layers are to stay as they are, or where this build of
    torch has no oneDNN.
    """
    if not torch.backends.mkldnn.is_available():
        raise AdapterError("This build of torch has no oneDNN: leave the model as it is.")
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise AdapterError("This model has adapters already: pack the base model, then add them.")
    count = 0
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if type(child) in LINEARS and child.weight.dtype is torch.float32 and child.weight.device.type == "cpu":
                parent._modules[name] = PackedLinear(child)
                count += 1
    return count
