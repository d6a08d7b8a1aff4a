"""The number format to train in on this CPU."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

# Adapters stay float32 and are converted at every layer: a smaller gain of the products is eaten up by that.
WORTHWHILE = 1.5


class Precision(NamedTuple):
    dtype: torch.dtype
    speedup: float  # of bfloat16 over float32


def fastest_precision() -> Precision:
    """bfloat16 where this CPU multiplies it clearly faster than float32, measured rather than guessed from its name."""
    import torch

    speedup = product_seconds(torch.float32) / product_seconds(torch.bfloat16)
    return Precision(torch.bfloat16 if speedup >= WORTHWHILE else torch.float32, speedup)


def product_seconds(dtype: torch.dtype) -> float:
    """The fastest of several products of a typical size: the one that other programs disturbed least."""
    import torch

    inputs = torch.ones(512, 576, dtype=dtype)
    weight = torch.ones(1536, 576, dtype=dtype)
    times = []
    for _ in range(15):
        start = time.perf_counter()
        torch.nn.functional.linear(inputs, weight)
        times.append(time.perf_counter() - start)
    return min(times)
