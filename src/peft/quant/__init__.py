"""Quantization backends: read and write a base weight however it is stored, one file per library."""

from peft.quant import bnb
from peft.quant.backend import Plain

BACKENDS: list[type[Plain]] = [bnb.FourBit, bnb.EightBit]  # the first match wins; `Plain` owns the rest


def find(base):
    """The backend that stores the weight of `base`."""
    return next((backend() for backend in BACKENDS if backend.owns(base)), PLAIN)


PLAIN = Plain()
