"""Prepare a model for training: dtypes, frozen weights, checkpointing, shifted labels."""

import inspect
import warnings

import torch
from torch import nn

from peft import quant
from peft.core.checkpoint import base_slots

HALF = (torch.float16, torch.bfloat16)
QUANTIZED_ELSEWHERE = ("gptq", "aqlm", "eetq", "hqq", "torchao")  # these store half-precision tensors on purpose
QUANTIZED_FLAGS = ("is_loaded_in_8bit", "is_loaded_in_4bit", "hqq_quantized")


def prepare_model_for_kbit_training(
    model,
    use_gradient_checkpointing=True,
    gradient_checkpointing_kwargs=None,
    auto_clear_cache=True,
    *,
    upcast=None,
):
    """Freeze a model, give its float weights a dtype to train beside, and, if it is quantized, checkpoint it.

    use_gradient_checkpointing: only quantized models are switched to it, with gradient_checkpointing_kwargs.
    auto_clear_cache: give the memory of the half-precision copies back to the device.
    upcast: make half-precision weights that are not quantized float32. True: all, which doubles the activations; False:
    none; None: where it is needed, which it is not for bfloat16 in a quantized model, as its range is that of float32.
    Returns the model. One that has adapters keeps training them.
    """
    own = {id(slot.tensor): slot.tensor for slot in base_slots(model).values() if isinstance(slot.tensor, nn.Parameter)}
    for p in own.values():
        p.requires_grad = False
    method = getattr(model, "quantization_method", None)
    elsewhere = str(getattr(method, "value", method)) in QUANTIZED_ELSEWHERE or getattr(model, "hqq_quantized", False)
    quantized = elsewhere or any(quant.find(m).name for m in model.modules())
    quantized = quantized or any(getattr(model, flag, False) for flag in QUANTIZED_FLAGS)
    if upcast is not False and (upcast or not elsewhere):
        _to_float32(own.values(), (torch.float16,) if quantized and not upcast else HALF, auto_clear_cache)
    if not (quantized and use_gradient_checkpointing):
        return model
    options = gradient_checkpointing_kwargs or {}
    if options.get("use_reentrant", True):  # re-entrant checkpointing drops gradients where no input asks for one
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        else:
            model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_(True))
    what = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # since transformers 5.24
    enable, name = getattr(model, f"{what}_checkpointing_enable"), f"{what}_checkpointing_kwargs"
    known = name in inspect.signature(enable).parameters
    if options and not known:
        warnings.warn(
            f"gradient_checkpointing_kwargs={options} is ignored: {type(model).__name__} does not take any.",
            stacklevel=2,
        )
    enable(**({name: options} if known else {}))
    return model


def _to_float32(parameters, dtypes, clear_cache):
    devices = set()
    for p in parameters:
        if p.dtype in dtypes and type(p) is nn.Parameter:  # a quantized one may be of a half-precision dtype too
            p.data = p.data.float()
            devices.add(p.device.type)
    for device in devices & {"cuda", "xpu", "mps"} if clear_cache else ():
        getattr(torch, device).empty_cache()


def cast_mixed_precision_params(model, dtype):
    """Frozen parameters become `dtype`, trained ones float32."""
    for p in model.parameters():
        p.data = p.data.to(torch.float32 if p.requires_grad else dtype)


def shift_tokens_right(input_ids, pad_token_id, decoder_start_token_id):
    """Decoder inputs from labels: one to the right, -100 replaced by padding; (batch, length) -> the same shape."""
    if pad_token_id is None:
        raise ValueError("pad_token_id has to be defined: labels are padded with -100, which is no token.")
    shifted = torch.full_like(input_ids, decoder_start_token_id)
    shifted[:, 1:] = input_ids[:, :-1]
    return shifted.masked_fill_(shifted == -100, pad_token_id)
