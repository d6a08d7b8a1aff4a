"""GGUF: linear layers whose weights stay the blocks of a GGUF file, as transformers 5 loads them."""

import torch
from torch import nn

from peft.quant.backend import loaded, unwritable
from peft.quant.straight import Carried


class Gguf(Carried):
    """Packed: the blocks, weight (out, bytes of a row) uint8. What the package gguf can quantize can be packed."""

    name = "gguf"
    lossy = True

    @staticmethod
    def owns(base):
        return isinstance(base, loaded("transformers.integrations.gguf.utils", "GgufLinear"))

    def unpack(self, base, packed):
        from transformers.integrations.gguf.kernels import dequantize_blocks

        dtype = torch.get_default_dtype()
        W = dequantize_blocks(packed.detach(), base.ggml_type, base.out_features, base.in_features, dtype)
        order = base.input_permutation
        return W if order is None else torch.empty_like(W).index_copy_(1, order, W)

    def pack(self, base, W, old):
        from gguf import GGMLQuantizationType, quants

        kind = GGMLQuantizationType(base.ggml_type)
        W = W if base.input_permutation is None else W.index_select(1, base.input_permutation)
        try:
            blocks = quants.quantize(W.float().cpu().numpy(), kind)
        except NotImplementedError:
            raise unwritable("GgufLinear", f"only llama.cpp makes GGUF blocks of the type {kind.name}") from None
        return nn.Parameter(torch.from_numpy(blocks).view(torch.uint8).to(old.device), requires_grad=False)


BACKENDS = [Gguf]
