"""TransformerEngine: linear layers that compute in float8, from float weights or from ones kept in float8."""

from torch import nn

from peft.quant.backend import Plain, loaded
from peft.quant.forward_only import ForwardOnly


class TransformerEngine(ForwardOnly):
    """A float weight is merged into like any other; one that the library quantized gives out its values only."""

    name = "te"
    title = "TransformerEngine"
    codes = "weight"

    @staticmethod
    def owns(base):
        return isinstance(
            base, loaded("transformer_engine.pytorch", "Linear") + loaded("transformer_engine.pytorch.module", "Linear")
        )

    def unpack(self, base, packed):
        return packed.detach() if type(packed) is nn.Parameter else packed.detach().dequantize()

    def pack(self, base, W, old):
        if type(old) is not nn.Parameter:
            return super().pack(base, W, old)
        return Plain.pack(self, base, W, old)

    def placement(self, base, param):
        return base.weight.device, base.weight.dtype

    def attach(self, base):
        """Nothing: its own gradient is computed in float8, on purpose."""

    detach = attach


BACKENDS = [TransformerEngine]
