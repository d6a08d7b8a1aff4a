"""Quantization backends: read and write a base weight however it is stored, one file per library."""

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
    return next((backend() for backend in BACKENDS if backend.owns(base)), PLAIN)


PLAIN = Plain()
