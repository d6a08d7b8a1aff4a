"""bitsandbytes: 4-bit (NF4 and FP4, with or without double quantization) and 8-bit linear layers.

On CPUs with AVX512-BF16 the library rewrites a 4-bit weight at the first forward in eval mode: its codes in another
order, its scales rounded to bfloat16. It has no gradient for that form, and its own way back loses the scales. So a
hook keeps the scales before, and brings the weight back, bit for bit, when somebody needs a gradient or saves it.
"""

import copy
import functools

import torch

from peft.quant.backend import Plain, loaded

BLOCK_ROWS = 32  # the rows of a weight that the rewriting takes together


class FourBit(Plain):
    """Packed: a Params4bit, whose quant_state holds scales and shape."""

    name = "bnb 4bit"
    lossy = True

    @staticmethod
    def owns(base):
        return isinstance(base, loaded("bitsandbytes.nn", "Linear4bit"))

    @property
    def hooks(self):
        return (before_forward,)

    def attach(self, base):
        known = before_forward in base._forward_pre_hooks.values()
        if getattr(base, "support_avx512bf16_for_cpu", False) and not known:
            base.register_forward_pre_hook(before_forward)
            base.register_state_dict_pre_hook(before_saving)

    def detach(self, base):
        restore(base)
        for hooks in (base._forward_pre_hooks, base._state_dict_pre_hooks):
            for key in [k for k, hook in hooks.items() if hook in (before_forward, before_saving)]:
                del hooks[key]

    def put(self, base, param, packed):
        base._parameters[param] = packed
        base.quant_state = packed.quant_state

    def unpack(self, base, packed):
        return _dequantized(packed, base.compute_dtype or packed.quant_state.dtype)

    def pack(self, base, W, old):
        settings = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        new = type(old)(W.contiguous(), requires_grad=False, **{name: getattr(old, name) for name in settings})
        new = new.to(old.device)  # quantizes
        new.quant_state.dtype = getattr(old.quant_state, "original_dtype", old.quant_state.dtype)
        return new

    def placement(self, base, param):
        p = base._parameters[param]
        return p.device, base.compute_dtype or p.quant_state.dtype

    def maker(self, base, x):
        if type(base) not in loaded("bitsandbytes.nn", "Linear4bit", "LinearNF4", "LinearFP4"):
            return None
        packed = base._parameters["weight"]
        state = getattr(packed, "quant_state", None)
        if state is None or tuple(state.shape) != (base.out_features, base.in_features):
            return None
        dtype = base.compute_dtype if base.compute_type_is_set else x.dtype
        return None if dtype is None else functools.partial(_dequantized, packed, dtype)


def _dequantized(packed, dtype):
    """The weight (out, in) of a Params4bit, computed from its scales in float32."""
    from bitsandbytes.functional import dequantize_4bit

    codes, state = _as_quantized(packed)
    state = copy.copy(state)
    state.dtype = dtype
    return dequantize_4bit(codes, state)


def _as_quantized(packed):
    """(codes, quant_state) as quantizing made them, also while rewritten for the CPU; nothing is changed."""
    state = packed.quant_state
    if not _rewritten(state):
        return packed.data, state
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    codes, _ = _convert_weight_packed_for_cpu_inverse(packed.data, copy.copy(state))
    if (exact := getattr(state, "exact", None)) is None:  # rewritten before there was a hook: its scales are gone
        exact = copy.copy(state)
        exact.absmax = state.absmax.t().float().flatten()
        exact.dtype, exact.packing_format_for_cpu = state.original_dtype, False
        exact.offset = exact.state2 = None
    return codes, exact


def _rewritten(state):
    return getattr(state, "packing_format_for_cpu", False)


def restore(base):
    """Undo the rewriting of the layer's weight, if there was one."""
    packed = base.weight
    if getattr(packed, "quant_state", None) is not None and _rewritten(packed.quant_state):
        packed.data, packed.quant_state = _as_quantized(packed)
        base.quant_state = packed.quant_state


def before_forward(base, args):
    """Bring the weight into a form that this forward can use, and keep what the library is about to round."""
    x, state = args[0], getattr(base.weight, "quant_state", None)
    if state is None:
        return
    learns = base.training or (torch.is_grad_enabled() and x.requires_grad)
    if _rewritten(state):
        if learns:
            restore(base)
    elif not learns and x.device.type == "cpu":
        rows, columns = state.shape
        if rows % BLOCK_ROWS or columns % state.blocksize:
            base.support_avx512bf16_for_cpu = False  # the library would fail there
        else:
            state.exact = copy.copy(state)


def before_saving(base, prefix, keep_vars):
    restore(base)


class EightBit(Plain):
    """Packed: an Int8Params with its row scales in SCB."""

    name = "bnb 8bit"
    lossy = True

    @staticmethod
    def owns(base):
        return isinstance(base, loaded("bitsandbytes.nn", "Linear8bitLt")) and not base.state.has_fp16_weights

    def get(self, base, param):
        packed = super().get(base, param)
        if packed.SCB is None:  # the first forward moved them
            packed.SCB = base.state.SCB
        return packed

    def put(self, base, param, packed):
        base._parameters[param] = packed
        base.state.reset_grads()  # forgets codes and scales
        packed.CB = packed.data  # the next forward takes both from here

    def unpack(self, base, packed):
        return _from_rows(packed.data, packed.SCB, torch.float32 if base.bias is None else base.bias.dtype)

    def pack(self, base, W, old):
        return type(old)(W.contiguous(), requires_grad=False, has_fp16_weights=False).to(old.device)  # quantizes

    def placement(self, base, param):
        return base._parameters[param].device, torch.float32 if base.bias is None else base.bias.dtype

    def maker(self, base, x):
        if x.device.type != "cpu" or type(base) not in loaded("bitsandbytes.nn", "Linear8bitLt"):
            return None  # on accelerators the library multiplies in int8, which is faster
        packed = self.get(base, "weight")
        return functools.partial(_from_rows, packed.data, packed.SCB, x.dtype)


def _from_rows(codes, scales, dtype):
    """codes (out, in) int8 times scales (out,) / 127. By way of float32: mixed dtypes are forty times slower."""
    return codes.float().mul_((scales / 127)[:, None]).to(dtype)


BACKENDS = [FourBit, EightBit]
