"""torchao: weights that are tensors of a class of its own, in otherwise ordinary layers."""

import torch
from torch import nn

from peft.quant.backend import loaded, unwritable
from peft.quant.straight import Carried


class TorchAo(Carried):
    """Packed: the tensor. Its class and settings say how to make another one; some classes cannot be made so."""

    name = "torchao"
    lossy = True

    @staticmethod
    def owns(base):
        classes = loaded("torchao.utils", "TorchAOBaseTensor") + loaded("torchao.quantization", "NF4Tensor")
        return isinstance(base._parameters.get("weight"), classes)

    def unpack(self, base, packed):
        if hasattr(packed, "get_original_weight"):  # NF4
            return packed.detach().get_original_weight()
        try:
            return packed.detach().dequantize().to(packed.dtype)
        except NotImplementedError:  # stored in the order that its kernel reads: that alone can tell
            eye = torch.eye(packed.shape[1], dtype=packed.dtype, device=packed.device)
            with torch.no_grad():
                return nn.functional.linear(eye, packed.detach()).T

    def pack(self, base, W, old):
        make = REPACKED.get(type(old).__name__)
        if make is None:
            raise unwritable(f"torchao's {type(old).__name__}", "it does not say how it was made")
        return nn.Parameter(make(W.to(old.dtype).contiguous(), old), requires_grad=False)


def _granularity(old):
    """How many weights share a scale, in torchao's words."""
    from torchao.quantization import PerGroup, PerRow, PerTensor

    block, shape = list(old.block_size), list(old.shape)
    if block == shape:
        return PerTensor()
    return PerRow() if block == [1, shape[1]] else PerGroup(block[1])


def _symmetric(old):
    return old.zero_point is None or not old.zero_point.any()


def _mapping(old):
    from torchao.quantization import MappingType

    return MappingType.SYMMETRIC if _symmetric(old) else MappingType.ASYMMETRIC


def _int8(W, old):
    return type(old).from_hp(
        W,
        _granularity(old),
        mapping_type=_mapping(old),
        act_quant_kwargs=old.act_quant_kwargs,
        act_quant_scale=old.act_quant_scale,
        act_quant_zero_point=old.act_quant_zero_point,
        act_pre_scale=old.act_pre_scale,
        reduce_range=old.reduce_range,
    )


def _float8(W, old):
    return type(old).from_hp(
        W,
        float8_dtype=old.qdata.dtype,
        granularity=_granularity(old),
        mm_config=old.mm_config,
        kernel_preference=old.kernel_preference,
        act_quant_kwargs=old.act_quant_kwargs,
    )


def _intx(W, old):
    new = type(old).from_hp(W, old.block_size, old.target_dtype, mapping_type=_mapping(old))
    new.activation_quantization = old.activation_quantization
    return new


def _int4(W, old):
    return type(old).from_hp(W, list(old.block_size))


def _nf4(W, old):
    from torchao.quantization import to_nf4

    return to_nf4(W, old.block_size, old.scaler_block_size)


REPACKED = {
    "Int8Tensor": _int8,
    "Float8Tensor": _float8,
    "IntxUnpackedToInt8Tensor": _intx,
    "Int4Tensor": _int4,
    "Int4PlainInt32Tensor": _int4,
    "Int4TilePackedTo4dTensor": _int4,
    "Int4OpaqueTensor": _int4,
    "NF4Tensor": _nf4,
}


BACKENDS = [TorchAo]
