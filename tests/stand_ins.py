"""Quantized linear layers as other libraries have them: their own where they are installed, else stand-ins.

A stand-in has the name, home, attributes and packing of the library's class. Its forward multiplies by a float weight
that it keeps apart, without a gradient, as a GPU kernel does: so what is read from the packed tensors is held against
something else.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from models import noise
from torch import nn

GROUP = 16


def register(monkeypatch, home: str, cls: type) -> type:
    """Let the class be the one that its library would have loaded."""
    parts = home.split(".")
    if parts[0] == "transformers":
        importlib.import_module(home)
    for n in range(1, len(parts) + 1):
        if (name := ".".join(parts[:n])) not in sys.modules:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules[home], cls.__name__, cls, raising=False)
    cls.__module__ = home
    return cls


class Stored(nn.Module):
    """What all stand-ins share. W (out, in): the weight that the packed one stands for."""

    def __init__(self, W: torch.Tensor, bias: torch.Tensor | None, **attributes: object) -> None:
        super().__init__()
        self.__dict__["W"] = W
        self.out_features, self.in_features = W.shape
        for name, value in attributes.items():
            if isinstance(value, torch.Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        self.register_buffer("bias", bias)

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x.to(self.W.dtype), self.W, self.bias).to(x.dtype)


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(rows, n) codes -> (rows, n·bits / 32) int32, one bit after the other, the lowest first."""
    stream = (codes.numpy()[..., None] >> np.arange(bits)) & 1
    packed = np.packbits(stream.reshape(len(codes), -1).astype(np.uint8), axis=1, bitorder="little")
    return torch.from_numpy(packed.view("<i4").copy())


def in_groups(linear: nn.Linear, bits: int, order: torch.Tensor | None = None):
    """codes (out, in), zeros and scales (groups, out), the group of each input, and the weight they stand for."""
    W = linear.weight.detach()
    groups = torch.arange(W.shape[1]) // GROUP
    groups = groups if order is None else groups[order]
    parts = [W[:, groups == g] for g in range(int(groups.max()) + 1)]
    low, high = (torch.stack([f(p, dim=1) for p in parts]) for f in (torch.amin, torch.amax))
    scales = (high - low) / (2**bits - 1)
    zeros = (-low / scales).round().clamp(1, 2**bits - 1)  # files of GPTQ hold zeros less one
    s, z = scales[groups].T, zeros[groups].T
    codes = ((W / s).round() + z).clamp(0, 2**bits - 1)
    return codes.int(), zeros.int(), scales, groups, (codes - z) * s


def gptq(bits: int, ordered: bool = True):
    """auto-gptq's layer for its plain kernels."""

    def make(linear: nn.Linear, monkeypatch) -> Stored:
        order = None if ordered else torch.randperm(linear.in_features, generator=torch.Generator().manual_seed(3))
        codes, zeros, scales, groups, W = in_groups(linear, bits, order)
        cls = register(monkeypatch, "auto_gptq.nn_modules.qlinear.qlinear_cuda", type("QuantLinear", (Stored,), {}))
        packed = {"qweight": words(codes, bits).T.contiguous(), "qzeros": words(zeros - 1, bits)}
        return cls(W, linear.bias.detach(), bits=bits, scales=scales, g_idx=groups.int(), **packed)

    return make


def of_gptqmodel(base: str, name: str, module: str):
    """A layer of gptqmodel's whose kernel reads codes in an order of its own."""

    def make(linear: nn.Linear, monkeypatch) -> Stored:
        home = "gptqmodel.nn_modules.qlinear"
        root = register(monkeypatch, home, type("BaseQuantLinear", (Stored,), {}))
        parent = root if base == "BaseQuantLinear" else register(monkeypatch, home, type(base, (root,), {}))
        cls = register(monkeypatch, f"{home}.{module}", type(name, (parent,), {}))
        scales = torch.ones(4, linear.out_features)
        return cls(linear.weight.detach(), linear.bias.detach(), qweight=torch.zeros(4, 4).int(), scales=scales)

    return make


def awq(linear: nn.Linear, monkeypatch) -> Stored:
    """autoawq's layer: each word holds the codes of eight outputs, in the order 0 2 4 6 1 3 5 7."""
    codes, zeros, scales, _, W = in_groups(linear, 4)
    order = [8 * i + j for i in range(linear.out_features // 8) for j in (0, 2, 4, 6, 1, 3, 5, 7)]
    cls = register(monkeypatch, "awq.modules.linear", type("WQLinear_GEMM", (Stored,), {}))
    packed = {"qweight": words(codes.T[:, order].contiguous(), 4), "qzeros": words(zeros[:, order], 4)}
    return cls(W, linear.bias.detach(), w_bit=4, group_size=GROUP, scales=scales, **packed)


def aqlm(linear: nn.Linear, monkeypatch) -> Stored:
    """AQLM's layer: two codebooks of 16 blocks of 2 outputs and 8 inputs, codes stored with a sign."""
    out, inp = linear.weight.shape
    random = torch.Generator().manual_seed(5)
    codes = torch.randint(0, 256, (out // 2, inp // 8, 2), generator=random)
    books = torch.randn(2, 256, 2, 8, generator=random) / 10
    scales = torch.rand(out // 2, 1, 1, 1, generator=random) + 0.5
    W = torch.zeros(out, inp)
    for o in range(out // 2):
        for i in range(inp // 8):
            block = books[0, codes[o, i, 0]] + books[1, codes[o, i, 1]]
            W[2 * o : 2 * o + 2, 8 * i : 8 * i + 8] = block * scales[o].item()
    cls = register(monkeypatch, "aqlm.inference", type("QuantizedLinear", (Stored,), {}))
    return cls(W, linear.bias.detach(), codes=codes.to(torch.uint8).view(torch.int8), codebooks=books, scales=scales)


def eetq(linear: nn.Linear, monkeypatch) -> nn.Module:
    """transformers' EETQ layer, which has no attributes for its widths; only its kernel reads its bytes."""
    cls = register(monkeypatch, "transformers.integrations.eetq", type("EetqLinear", (Stored,), {}))
    shape = linear.weight.T.shape
    codes, scales = torch.zeros(shape, dtype=torch.int8), torch.ones(len(linear.weight), dtype=torch.float32)
    layer = cls(linear.weight.detach(), linear.bias.detach(), weight=codes, weight_scales=scales)
    del layer.in_features, layer.out_features
    return layer


def inc(linear: nn.Linear, monkeypatch) -> Stored:
    """Intel neural compressor's integer layer, which gives out its weight."""
    home = "neural_compressor.torch.algorithms.weight_only.modules"
    root = register(monkeypatch, home, type("WeightOnlyLinear", (Stored,), {}))
    cls = register(monkeypatch, home, type("INCWeightOnlyLinear", (root,), {"recover": lambda self: self.W}))
    codes, scales = torch.zeros(4, 4, dtype=torch.int32), torch.ones(4, len(linear.weight))
    return cls(linear.weight.detach(), linear.bias.detach(), qweight=codes, scales=scales)


def inc_float8(linear: nn.Linear, monkeypatch) -> Stored:
    """Its layer for Gaudi: a transposed float8 weight, and a kernel that also rounds its inputs."""
    home = "neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules"
    cls = register(monkeypatch, home, type("PatchedLinear", (Stored,), {}))
    W = linear.weight.detach().to(torch.float8_e4m3fn)
    return cls(W.float(), linear.bias.detach(), weight=W.T.contiguous())


class Dequantizable(torch.Tensor):
    """A parameter of TransformerEngine's, as far as an adapter sees it."""

    def dequantize(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def te(quantized: bool):
    """TransformerEngine's layer with a float weight, or with one that it has quantized."""

    def make(linear: nn.Linear, monkeypatch) -> nn.Linear:
        cls = register(monkeypatch, "transformer_engine.pytorch", type("Linear", (nn.Linear,), {}))
        linear.__class__ = cls
        if quantized:
            linear._parameters["weight"] = linear.weight.detach().as_subclass(Dequantizable)
        return linear

    return make


# -- the libraries themselves, where they are installed ----------------------------------------------------------------
def real_gptq(linear: nn.Linear, monkeypatch) -> nn.Module:
    """gptqmodel's torch kernel, on inputs that were quantized in an order of their own."""
    home = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")
    order = torch.randperm(linear.in_features, generator=torch.Generator().manual_seed(3))
    _, zeros, scales, groups, _ = in_groups(linear, 4, order)
    widths = {"in_features": linear.in_features, "out_features": linear.out_features}
    layer = home.TorchLinear(bits=4, group_size=GROUP, sym=False, desc_act=True, bias=True, **widths)
    layer.pack_original(linear, scales.T.contiguous(), zeros.T.float().contiguous(), groups.int())
    layer.post_init()
    return layer.eval()


def real_awq(linear: nn.Linear, monkeypatch) -> nn.Module:
    """gptqmodel's AWQ layer."""
    home = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch_awq")
    _, zeros, scales, _, _ = in_groups(linear, 4)
    widths = {"in_features": linear.in_features, "out_features": linear.out_features}
    settings = {"bits": 4, "group_size": GROUP, "sym": False, "desc_act": False, "bias": True, "register_buffers": True}
    layer = home.AwqTorchLinear(**settings, **widths)
    layer.pack(linear, scales.T.contiguous(), zeros.T.float().contiguous())
    layer.post_init()
    return layer.eval()


def real_autoawq(linear: nn.Linear, monkeypatch) -> nn.Module:
    """autoawq's own layer."""
    home = pytest.importorskip("awq.modules.linear")
    _, zeros, scales, _, _ = in_groups(linear, 4)
    return home.WQLinear_GEMM.from_linear(linear.half(), 4, GROUP, False, scales, zeros).eval()


def real_aqlm(linear: nn.Linear, monkeypatch) -> nn.Module:
    """AQLM's layer and its kernel for any number of codebooks."""
    home = pytest.importorskip("aqlm")
    layer = home.QuantizedLinear(linear.in_features, linear.out_features, 8, 2, 2, 12, bias=True, dtype=torch.float32)
    with torch.no_grad():
        for t, scale in ((layer.codebooks, 0.2), (layer.scales, 1.0), (layer.bias, 0.1)):
            t.copy_(noise(t.shape, 7) * scale)
        layer.codes.copy_((noise(layer.codes.shape, 8) * 2000).long())
    return layer


def real_inc(linear: nn.Linear, monkeypatch) -> nn.Module:
    """Intel neural compressor's integer layer."""
    home = pytest.importorskip("neural_compressor.torch.algorithms.weight_only.modules")
    codes, zeros, scales, _, _ = in_groups(linear, 4)
    layer = home.INCWeightOnlyLinear(
        linear.in_features, linear.out_features, bits=4, group_size=GROUP, zp=True, bias=True
    )
    layer.pack(codes, scales.T.contiguous(), zeros.T.contiguous(), linear.bias.detach())
    return layer.eval()


def gguf(kind: str, permuted: bool = False):
    """transformers' GGUF layer, multiplying as it does for many rows: few need a kernel from the hub."""

    def make(linear: nn.Linear, monkeypatch) -> nn.Module:
        home = pytest.importorskip("transformers.integrations.gguf.utils")
        quants = pytest.importorskip("gguf.quants")
        from gguf import GGMLQuantizationType

        monkeypatch.setattr(home, "MAX_GEMV_ROWS", 0)
        kind_ = GGMLQuantizationType[kind]
        layer = home.GgufLinear(linear.in_features, linear.out_features, int(kind_), bias=True)
        layer.weight.data = torch.from_numpy(quants.quantize(linear.weight.detach().numpy(), kind_))
        layer.bias.data = linear.bias.detach()
        if permuted:
            layer.input_permutation = torch.randperm(linear.in_features, generator=torch.Generator().manual_seed(2))
        return layer

    return make


def nf4(linear: nn.Linear, monkeypatch) -> nn.Module:
    """torchao's NF4 tensor."""
    ao = pytest.importorskip("torchao.quantization")
    linear.weight = nn.Parameter(ao.to_nf4(linear.weight.detach(), 32, 2), requires_grad=False)
    return linear


def int4(linear: nn.Linear, monkeypatch) -> nn.Module:
    """torchao's 4-bit weight for CPUs, in the order that its kernel reads."""
    ao = pytest.importorskip("torchao.quantization")
    config = pytest.importorskip("torchao.prototype.quantization.int4").PrototypeInt4WeightOnlyConfig
    ao.quantize_(nn.Sequential(linear), config(group_size=32))
    return linear


def activations_too(linear: nn.Linear, monkeypatch) -> nn.Module:
    """torchao's int8 weight with inputs rounded to int8, whose product has no gradient."""
    ao = pytest.importorskip("torchao.quantization")
    ao.quantize_(nn.Sequential(linear), ao.Int8DynamicActivationInt8WeightConfig())
    return linear


def hqq4(linear: nn.Linear, monkeypatch) -> nn.Module:
    """HQQ in 4 bits."""
    home = pytest.importorskip("hqq.core.quantize")
    settings = home.BaseQuantizeConfig(nbits=4, group_size=GROUP, axis=1)
    return home.HQQLinear(linear.requires_grad_(False), settings, compute_dtype=torch.float32, device="cpu")
