"""Quantization backends: read and write a base weight however it is stored, one file per library."""

import importlib
import sys

from torch import nn

from peft.ops.product import LINEARS
from peft.quant.backend import PLAIN, Plain

FILES = (  # (library, our file for it, which nobody needs before the library is imported); the first that fits counts
    ("peft.quant.onednn", "onednn"),
    ("bitsandbytes", "bnb"),
    ("torchao", "torchao"),
    ("hqq", "hqq"),
    ("optimum.quanto", "quanto"),
    ("transformers.integrations.gguf.utils", "gguf"),
    ("gptqmodel", "awq"),
    ("awq", "awq"),
    ("gptqmodel", "gptq"),
    ("auto_gptq", "gptq"),
    ("transformers.integrations.eetq", "eetq"),
    ("eetq", "eetq"),
    ("aqlm", "aqlm"),
    ("neural_compressor", "inc"),
    ("transformer_engine", "te"),
)
BACKENDS: list[type[Plain]] = []  # further ones, asked first


def backends():
    """The quantized backends that could own a layer now; `Plain` owns what none of them does."""
    files = dict.fromkeys(file for library, file in FILES if library in sys.modules)
    return BACKENDS + [cls for file in files for cls in importlib.import_module(f"peft.quant.{file}").BACKENDS]


def find(base):
    """The backend that stores the weight of `base`."""
    if is_plain(base):
        return PLAIN
    return next((backend() for backend in backends() if backend.owns(base)), PLAIN)


def is_plain(base):
    """Whether a look is enough: most layers are so, and no backend need be asked."""
    return type(base) in LINEARS and type(base._parameters["weight"]) is nn.Parameter


def attach(model):
    """Let backends change what they must about a model's layers, adapted or not, before it is trained."""
    _tell(model, "attach")


def detach(model):
    """Undo `attach`."""
    _tell(model, "detach")


def _tell(model, what):
    told = [backend for backend in backends() if getattr(backend, what) is not getattr(Plain, what)]
    for module in model.modules() if told else ():
        holds = module._parameters or module._buffers or not module._modules
        if holds and not is_plain(module) and (backend := next((b for b in told if b.owns(module)), None)) is not None:
            getattr(backend(), what)(module)
