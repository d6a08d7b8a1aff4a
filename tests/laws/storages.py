"""Ways to store a linear layer's weight, which the laws in test_quantized.py run over: a row adds a library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from helpers import needs
from torch import nn


@dataclass(frozen=True)
class Storage:
    """One library with one setting.

    quantize: makes its layer from an nn.Linear whose widths need not be multiples of anything
    every: run all examples; else, and in the fast suite, the first one of each method and variant. Rows without it are
        slow tests: give it to one row of each library
    """

    name: str
    library: str  # the module that must be installed
    quantize: Callable[[nn.Linear], nn.Module]
    tolerance: float = 5e-6  # outputs and gradients in training, against the same float weight
    kernel: float = 5e-6  # outputs in evaluation, where libraries may multiply in fewer bits
    stores: float | None = 0.0  # how far a merge may be from quantizing the merged weight anew; None: it cannot store
    every: bool = False

    def __str__(self) -> str:
        return self.name

    def params(self, example: object, first: bool) -> object:
        """A pytest parameter set, skipped where the library is missing. first: the example is a first one."""
        slow = not (first and self.every)
        marks = [pytest.mark.skipif(bool(needs(self.library)), reason=f"needs {self.library}")]
        return pytest.param(example, self, id=f"{self.name}-{example}", marks=marks + [pytest.mark.slow] * slow)


def bnb_4bit(quant_type: str, double: bool) -> Callable[[nn.Linear], nn.Module]:
    """Quantizes with bitsandbytes' Linear4bit."""

    def quantize(linear: nn.Linear) -> nn.Module:
        import bitsandbytes

        layer = bitsandbytes.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            compute_dtype=linear.weight.dtype,
            compress_statistics=double,
            quant_type=quant_type,
        )
        layer.load_state_dict(linear.state_dict())
        layer.support_avx512bf16_for_cpu = False  # its kernel for inference does not take the laws' small widths
        return layer.to("cpu")  # quantizes

    return quantize


def bnb_8bit(linear: nn.Linear) -> nn.Module:
    """Quantizes with bitsandbytes' Linear8bitLt."""
    import bitsandbytes

    layer = bitsandbytes.nn.Linear8bitLt(
        linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False, threshold=6.0
    )
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


BNB = "bitsandbytes"
STORAGES = [
    Storage("nf4_double", BNB, bnb_4bit("nf4", True), every=True),
    Storage("nf4", BNB, bnb_4bit("nf4", False)),
    Storage("fp4", BNB, bnb_4bit("fp4", False)),
    Storage("int8", BNB, bnb_8bit, kernel=0.03, every=True),
]


def quantized(model: nn.Module, storage: Storage) -> nn.Module:
    """The model with each nn.Linear stored that way."""
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, storage.quantize(module))
    for p in model.parameters():
        p.requires_grad = False
    return model
