"""Random tensors that a seed gives back: frozen bases that a file need not hold."""

import math

import torch


def kaiming_uniform(shape, generator):
    """Uniform in ±√(6 / fan_in), float32 on the CPU: a seed gives upstream's values."""
    bound = math.sqrt(6 / math.prod(shape[1:]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
