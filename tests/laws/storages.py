"""Ways to store a linear layer's weight, which the laws in test_quantized.py run over: a row adds a library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
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
    jumps: float = 0.0  # what a tiny change of x may change, where x is rounded too
    every: bool = False
    copies: bool = True  # False: copy.deepcopy does not know the library's tensors

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


def torchao(**settings: Any) -> Callable[[nn.Linear], nn.Module]:
    """Quantizes with the config that `settings` name, in torchao.quantization."""

    def quantize(linear: nn.Linear) -> nn.Module:
        import torchao.quantization as ao

        options = {k: getattr(ao, v) if isinstance(v, str) else v for k, v in settings.items() if k != "config"}
        ao.quantize_(nn.Sequential(linear), getattr(ao, settings["config"])(**options))
        return linear

    return quantize


def hqq(bits: int) -> Callable[[nn.Linear], nn.Module]:
    """Quantizes with HQQ, a group for each row."""

    def quantize(linear: nn.Linear) -> nn.Module:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        settings = BaseQuantizeConfig(nbits=bits, group_size=None, axis=1)
        return HQQLinear(linear.requires_grad_(False), settings, compute_dtype=linear.weight.dtype, device="cpu")

    return quantize


def onednn(linear: nn.Linear) -> nn.Module:
    """The same floats in the order of oneDNN's kernels."""
    import peft

    model = nn.Sequential(linear)
    peft.pack_linears(model)
    return model[0]


def quanto(bits: str) -> Callable[[nn.Linear], nn.Module]:
    """Quantizes with optimum-quanto."""

    def quantize(linear: nn.Linear) -> nn.Module:
        import optimum.quanto

        model = nn.Sequential(linear)
        optimum.quanto.quantize(model, weights=getattr(optimum.quanto, bits))
        optimum.quanto.freeze(model)
        return model[0]

    return quantize


BNB, TWICE = "bitsandbytes", "Int8DynamicActivationInt8WeightConfig"
STORAGES = [
    Storage("nf4_double", BNB, bnb_4bit("nf4", True), every=True),
    Storage("nf4", BNB, bnb_4bit("nf4", False)),
    Storage("fp4", BNB, bnb_4bit("fp4", False)),
    Storage("int8", BNB, bnb_8bit, kernel=0.03, every=True),
    Storage("torchao_int8", "torchao", torchao(config="Int8WeightOnlyConfig"), every=True),
    Storage("torchao_int4", "torchao", torchao(config="IntxWeightOnlyConfig", weight_dtype=torch.int4)),
    Storage("torchao_float8", "torchao", torchao(config="Float8WeightOnlyConfig")),
    Storage("torchao_int8_twice", "torchao", torchao(config=TWICE), tolerance=0.05, kernel=0.05, jumps=0.01),
    Storage("hqq", "hqq", hqq(8), stores=1e-6),  # its 4-bit codes need an even number of rows
    Storage("onednn", "torch", onednn, every=True),
    Storage("quanto_int8", "optimum.quanto", quanto("qint8"), every=True, copies=False),
    Storage("quanto_int4", "optimum.quanto", quanto("qint4"), copies=False),
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
