"""HQQ: linear layers of 1 to 8 bits, whose scales and zeros are found without data."""

import torch

from peft.errors import MergeError
from peft.quant.backend import Plain, loaded


class Hqq(Plain):
    """Packed: {"W_q": the codes} and all that is needed to read them, which HQQLinear keeps in `meta`."""

    name = "hqq"
    lossy = True

    @staticmethod
    def owns(base):
        return isinstance(base, loaded("hqq.core.quantize", "HQQLinear"))

    def get(self, base, param):
        if not base.ready:
            raise MergeError("This HQQLinear holds no weight yet: load or quantize it before reading it.")
        return {"W_q": super().get(base, "W_q"), **base.meta}

    def put(self, base, param, packed):
        base.meta = {k: v for k, v in packed.items() if k != "W_q"}
        base._parameters["W_q"] = packed["W_q"]

    def unpack(self, base, packed):
        return _quantizer().dequantize(packed["W_q"].data, packed).to(base.compute_dtype)

    def pack(self, base, W, old):
        codes, found = _quantizer().quantize(
            W,
            device=str(W.device),
            compute_dtype=base.compute_dtype,
            **{**base.quant_config["weight_quant_params"], "group_size": old["group_size"]},
        )
        found = {k: v.to(old[k].dtype) if isinstance(v, torch.Tensor) else v for k, v in found.items()}
        return {**old, **found, "W_q": type(old["W_q"])(codes, requires_grad=False)}

    def placement(self, base, param):
        return base.W_q.device, base.compute_dtype


def _quantizer():
    from hqq.core.quantize import Quantizer

    return Quantizer


BACKENDS = [Hqq]
