"""Quantization backends: read and write a base weight however it is stored, one file per library."""

import sys

from torch import nn

from peft.quant import aqlm, awq, bnb, eetq, gguf, gptq, hqq, inc, quanto, te, torchao
from peft.quant.backend import Plain

BACKENDS: list[type[Plain]] = [  # the first match wins; `Plain` owns the rest
    bnb.FourBit,
    bnb.EightBit,
    torchao.TorchAo,
    hqq.Hqq,
    quanto.Quanto,
    gguf.Gguf,
    awq.Awq,
    awq.AutoAwq,
    gptq.Gptq,
    gptq.AutoGptq,
    gptq.GptqModel,  # after those that know their format
    eetq.Eetq,
    eetq.OwnEetq,
    aqlm.Aqlm,
    inc.Inc,
    inc.IncFloat8,
    te.TransformerEngine,
]


def find(base):
    """The backend that stores the weight of `base`."""
    if type(base) is nn.Linear and type(base._parameters["weight"]) is nn.Parameter:  # most layers: no need to ask all
        return PLAIN
    return next((backend() for backend in BACKENDS if _loaded(backend) and backend.owns(base)), PLAIN)


PLAIN = Plain()


def attach(model):
    """Let backends change what they must about a model's layers, adapted or not, before it is trained."""
    _tell(model, "attach")


def detach(model):
    """Undo `attach`."""
    _tell(model, "detach")


def _tell(model, what):
    told = [b for b in BACKENDS if getattr(b, what) is not getattr(Plain, what) and _loaded(b)]
    for module in model.modules() if told else ():
        if (backend := next((b for b in told if b.owns(module)), None)) is not None:
            getattr(backend(), what)(module)


def _loaded(backend):
    """Whether somebody has imported the library: there are no layers of it otherwise."""
    return not backend.library or backend.library in sys.modules
