"""AWQ layers of autoawq and gptqmodel."""

import torch

from peft.quant.backend import loaded
from peft.quant.forward_only import ForwardOnly
from peft.quant.gptq import unpacked

ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in its word a 4-bit code lies


class Awq(ForwardOnly):
    """Codes packed along the outputs: qweight (in, out·bits/32), qzeros (groups, out·bits/32), both int32, scales
    (groups, out). So it is in the layers whose names say GEMM; others have orders of their own."""

    name = "awq"
    title = "AWQ"

    @staticmethod
    def owns(base):
        return isinstance(base, loaded("gptqmodel.nn_modules.qlinear", "AWQuantLinear"))

    def unpack(self, base, packed):
        gemm = loaded("gptqmodel.nn_modules.qlinear.gemm_awq", "AwqGEMMLinear")
        if type(base) in gemm + loaded("gptqmodel.nn_modules.qlinear.torch_awq", "AwqTorchLinear"):
            return dequantized(packed, base.qzeros, base.scales, base.bits)
        return super().unpack(base, packed)


class AutoAwq(Awq):
    @staticmethod
    def owns(base):
        kernels = ("GEMM", "GEMV", "GEMVFast", "Marlin", "Exllama", "ExllamaV2", "IPEX")
        return isinstance(base, loaded("awq.modules.linear", *(f"WQLinear_{k}" for k in kernels)))

    def unpack(self, base, packed):
        if type(base) in loaded("awq.modules.linear", "WQLinear_GEMM"):
            return dequantized(packed, base.qzeros, base.scales, base.w_bit)
        return ForwardOnly.unpack(self, base, packed)


def dequantized(qweight, qzeros, scales, bits):
    """The weight (out, in) of tensors packed as in `Awq`."""
    codes, zeros = (_ordered(words, bits).to(scales.dtype) for words in (qweight, qzeros))
    size = len(qweight) // len(scales)
    return ((codes - zeros.repeat_interleave(size, 0)) * scales.repeat_interleave(size, 0)).T


def _ordered(words, bits):
    """(rows, n) words -> (rows, 32n / bits) codes in the order of the outputs."""
    codes = unpacked(words, bits)
    if bits != 4:
        return codes
    return codes.unflatten(-1, (-1, 8))[..., torch.tensor(ORDER, device=words.device)].flatten(-2)


BACKENDS = [Awq, AutoAwq]
