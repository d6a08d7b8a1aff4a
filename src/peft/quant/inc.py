"""Intel neural compressor: packed integer layers on CPUs and float8 layers on Gaudi accelerators."""

import torch

from peft.quant.backend import Plain, loaded
from peft.quant.forward_only import ForwardOnly


class Inc(ForwardOnly):
    """A WeightOnlyLinear, which can give out its weight itself."""

    name = "inc"
    title = "Intel neural compressor"

    @staticmethod
    def owns(base):
        return isinstance(base, loaded("neural_compressor.torch.algorithms.weight_only.modules", "WeightOnlyLinear"))

    def unpack(self, base, packed):
        return base.recover().detach().to(base.scales.dtype)


class IncFloat8(ForwardOnly):
    """A linear layer patched for float8: weight (in, out), quantized together with its inputs."""

    name = "inc"
    title = "Intel neural compressor"
    codes = "weight"

    @staticmethod
    def owns(base):
        module = "neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules"
        return isinstance(base, loaded(module, "PatchedLinear"))

    def placement(self, base, param):
        device, dtype = Plain.placement(self, base, "weight")
        return device, torch.bfloat16 if dtype.itemsize == 1 else dtype  # there is no arithmetic in float8


BACKENDS = [Inc, IncFloat8]
