"""Prepare a model for training: dtypes, frozen weights, checkpointing, shifted labels."""

import inspect
import warnings

import torch

QUANTIZED_ELSEWHERE = ("gptq", "aqlm", "eetq", "hqq", "torchao")  # these store half-precision tensors on purpose
QUANTIZED_FLAGS = ("is_loaded_in_8bit", "is_loaded_in_4bit", "hqq_quantized")


def prepare_model_for_kbit_training(
    model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=None, auto_clear_cache=True
):
    """Freeze a model, make its unquantized half-precision weights float32 and, if it is quantized, checkpoint it.

    use_gradient_checkpointing: only quantized models are switched to it, with gradient_checkpointing_kwargs.
    auto_clear_cache: give the memory of the half-precision copies back to the device. Returns the model.
    """
    for p in model.parameters():
        p.requires_grad = False
    method = getattr(model, "quantization_method", None)
    elsewhere = str(getattr(method, "value", method)) in QUANTIZED_ELSEWHERE
    quantized = elsewhere or any(getattr(model, flag, False) for flag in QUANTIZED_FLAGS)
    if not elsewhere and not getattr(model, "hqq_quantized", False):
        _to_float32(model, auto_clear_cache)
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


def _to_float32(model, clear_cache):
    devices = set()
    for p in model.parameters():
        if p.dtype in (torch.float16, torch.bfloat16) and type(p).__name__ != "Params4bit":
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
