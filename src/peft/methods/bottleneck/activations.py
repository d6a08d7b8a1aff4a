"""The non-linearities that a config can name."""

import torch
import torch.nn.functional as F


def _tanh_gelu(x):
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def _linear(x):
    return x


ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": _tanh_gelu,
    "quick_gelu": _quick_gelu,
    "swish": F.silu,
    "silu": F.silu,
    "leakyrelu": F.leaky_relu,
    "relu6": F.relu6,
    "elu": F.elu,
    "mish": F.mish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "linear": _linear,
}
