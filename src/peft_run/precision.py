"""The number format to train in on this CPU."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

# Adapters stay float32 and are converted at every layer, which takes a part of the gain back.
WORTHWHILE = 1.5
PACKED_ROWS = 8  # a few texts at once take so many rows of a product at a step


class Precision(NamedTuple):
    dtype: torch.dtype
    speedup: float  # of bfloat16 over float32


def fastest_precision() -> Precision:
    """bfloat16 where this CPU multiplies it clearly faster than float32, measured rather than guessed from its name."""
    import torch

    layers = {dtype: typical_layer(dtype) for dtype in (torch.float32, torch.bfloat16)}
    seconds: dict[torch.dtype, list[float]] = {dtype: [] for dtype in layers}
    # In turns, and the best of several: other programs then disturb both alike, or neither.
    for _ in range(20):
        for dtype, times in seconds.items():
            times.append(product_seconds(layers[dtype]))
    speedup = min(seconds[torch.float32]) / min(seconds[torch.bfloat16])
    return Precision(torch.bfloat16 if speedup >= WORTHWHILE else torch.float32, speedup)


def typical_layer(dtype: torch.dtype) -> torch.nn.Linear:
    """A frozen layer that multiplies as a base model's do."""
    import torch

    import peft

    layer = torch.nn.utils.skip_init(torch.nn.Linear, 576, 1536, bias=False, dtype=dtype).requires_grad_(False)
    layer.weight.fill_(1)
    peft.use_onednn(layer)
    return layer


def product_seconds(layer: torch.nn.Linear) -> float:
    """The time of one product of a typical size."""
    import torch

    inputs = torch.ones(256, layer.in_features, dtype=layer.weight.dtype)
    start = time.perf_counter()
    layer(inputs)
    return time.perf_counter() - start


def packing_gain() -> float:
    """How many times faster `peft.pack_linears` makes float32 products of a few rows on this CPU, measured."""
    import torch
    from torch import nn

    import peft

    layers = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(8)))  # more than the caches hold
    peft.use_onednn(layers)
    packed = nn.Sequential(*layers)
    if not torch.backends.mkldnn.is_available() or not peft.pack_linears(packed):
        return 1.0
    seconds: dict[nn.Module, list[float]] = {layers: [], packed: []}
    x = torch.ones(PACKED_ROWS, 1024)
    with torch.inference_mode():
        for _ in range(6):
            for model, times in seconds.items():
                start = time.perf_counter()
                model(x)
                times.append(time.perf_counter() - start)
    return min(seconds[layers]) / min(seconds[packed])


def quantization(storage: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` must be given for a base whose linear layers are stored in 4 or 8 bits."""
    if storage is None:
        return {}
    from transformers import BitsAndBytesConfig

    if storage == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=storage,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config}


def compute_exactly(model: torch.nn.Module) -> bool:
    """Let the model's quantized layers, if it has any, multiply in float32, without rounding activations too.

    In evaluation mode their library takes kernels that round. Returns whether there are such layers.
    """
    import torch

    found = False
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and not weight.is_floating_point():
            found = module.training = True
            if hasattr(module, "compute_dtype"):
                module.compute_dtype = torch.float32
    return found
