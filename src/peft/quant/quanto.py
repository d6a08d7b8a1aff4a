"""optimum-quanto: layers whose weights, once frozen, are tensors of a class of its own."""

import copy

from torch import nn

from peft.quant.backend import Plain, loaded


class Quanto(Plain):
    """Packed: the tensor. Before a layer is frozen its weight is float, and it quantizes that in each forward."""

    name = "quanto"
    lossy = True

    @staticmethod
    def owns(base):
        return isinstance(base._parameters.get("weight"), loaded("optimum.quanto", "QTensor"))

    def unpack(self, base, packed):
        return packed.detach().dequantize()

    def pack(self, base, W, old):
        thawed = copy.copy(base)
        thawed.__dict__["_parameters"] = {**base._parameters, "weight": nn.Parameter(W.to(old.dtype), False)}
        return nn.Parameter(thawed.qweight.detach(), requires_grad=False)  # with the layer's own settings


BACKENDS = [Quanto]
