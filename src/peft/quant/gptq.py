"""GPTQ layers of gptqmodel and auto-gptq, and whatever other formats gptqmodel has layers for."""

import torch

from peft.quant.backend import loaded
from peft.quant.forward_only import ForwardOnly

PLAIN_KERNELS = ("cuda", "cuda_old", "triton")  # of auto-gptq; others reorder what files hold


class GptqModel(ForwardOnly):
    """A layer of gptqmodel in a format that has no backend of its own."""

    name = "gptqmodel"
    title = "gptqmodel's"

    @staticmethod
    def owns(base):
        return isinstance(base, loaded("gptqmodel.nn_modules.qlinear", "BaseQuantLinear"))

    def get(self, base, param):
        return getattr(base, self.codes) if hasattr(base, self.codes) else next(base.buffers())

    def placement(self, base, param):
        floats = [t for t in base.buffers() if t.is_floating_point() and t.itemsize > 1]
        return self.get(base, param).device, floats[0].dtype if floats else torch.get_default_dtype()


class Gptq(ForwardOnly):
    """Codes packed along the inputs: qweight (in·bits/32, out), qzeros (groups, out·bits/32), both int32, scales
    (groups, out), and g_idx (in,), the group of each input."""

    name = "gptq"
    title = "GPTQ"

    @staticmethod
    def owns(base):
        return isinstance(base, loaded("gptqmodel.nn_modules.qlinear", "GPTQQuantLinear"))

    def unpack(self, base, packed):
        return base.dequantize_weight().T if hasattr(base, "dequantize_weight") else super().unpack(base, packed)


class AutoGptq(Gptq):
    @staticmethod
    def owns(base):
        return isinstance(base, _auto_gptq(*PLAIN_KERNELS, "exllama", "exllamav2"))

    def unpack(self, base, packed):
        if isinstance(base, _auto_gptq(*PLAIN_KERNELS)):
            return dequantized(packed, base.qzeros, base.scales, base.g_idx, base.bits)
        return super().unpack(base, packed)


def _auto_gptq(*kernels):
    layers = (loaded(f"auto_gptq.nn_modules.qlinear.qlinear_{k}", "QuantLinear") for k in kernels)
    return sum(layers, ())


def dequantized(qweight, qzeros, scales, g_idx, bits, offset=1):
    """The weight (out, in) of tensors packed as in `Gptq`. Files store zeros less `offset`."""
    codes = unpacked(qweight.T, bits).T  # (in, out)
    zeros = (unpacked(qzeros, bits) + offset).to(scales.dtype)  # (groups, out)
    group = g_idx.long()
    return ((codes.to(scales.dtype) - zeros[group]) * scales[group]).T


def unpacked(words, bits):
    """(rows, n) int32 words -> (rows, 32n / bits) codes, the lowest bits first; a code may lie across two words."""
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
        return ((words[..., None] >> shifts) & (2**bits - 1)).flatten(-2)
    places = torch.arange(32, dtype=torch.int32, device=words.device)
    stream = ((words[..., None] >> places) & 1).flatten(-2).unflatten(-1, (-1, bits))  # (rows, codes, bits)
    return (stream << places[:bits]).sum(-1, dtype=torch.int32)


BACKENDS = [Gptq, AutoGptq, GptqModel]  # the last takes what is left
