"""Quantization backends: read and write a base weight however it is stored, one file per library."""

import importlib
import sys

from peft.quant.backend import PLAIN, Plain

FILES = {"bitsandbytes": "bnb"}  # library -> our file for it, which nobody needs before the library is imported
BACKENDS: list[type[Plain]] = []  # further ones, asked first


def backends():
    """The quantized backends that could own a layer now; `Plain` owns what none of them does."""
    files = [file for library, file in FILES.items() if library in sys.modules]
    return BACKENDS + [cls for file in files for cls in importlib.import_module(f"peft.quant.{file}").BACKENDS]


def find(base):
    """The backend that stores the weight of `base`."""
    return next((backend() for backend in backends() if backend.owns(base)), PLAIN)


def attach(model):
    """Let backends change what they must about a model's layers, adapted or not, before it is trained."""
    _tell(model, "attach")


def detach(model):
    """Undo `attach`."""
    _tell(model, "detach")


def _tell(model, what):
    told = [backend for backend in backends() if getattr(backend, what) is not getattr(Plain, what)]
    for module in model.modules() if told else ():
        for backend in told:
            if backend.owns(module):
                getattr(backend(), what)(module)
