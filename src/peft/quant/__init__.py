"""Quantization backends: read and write a base weight however it is stored, one file per library."""

import sys

from peft.quant import bnb
from peft.quant.backend import Plain

BACKENDS: list[type[Plain]] = [bnb.FourBit, bnb.EightBit]  # the first match wins; `Plain` owns the rest


def find(base):
    """The backend that stores the weight of `base`."""
    return next((backend() for backend in BACKENDS if backend.owns(base)), PLAIN)


PLAIN = Plain()


def attach(model):
    """Let backends change what they must about a model's layers, adapted or not, before it is trained."""
    _tell(model, "attach")


def detach(model):
    """Undo `attach`."""
    _tell(model, "detach")


def _tell(model, what):
    told = [b for b in BACKENDS if getattr(b, what) is not getattr(Plain, what) and b.library in sys.modules]
    for module in model.modules() if told else ():
        for backend in told:
            if backend.owns(module):
                getattr(backend(), what)(module)
