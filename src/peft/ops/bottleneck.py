"""The fused bottleneck: y + s·U f(D y + d) + s·u, in few passes over the activations.

The biases ride in the products, as a column of ones beside f's values, so neither they nor their gradients cost a pass
of their own; of the bottleneck only what goes into f is kept for the backward pass.
"""

import torch
import torch.nn.functional as F


def _leaky(x):
    return F.leaky_relu(x)


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
    "leakyrelu": _leaky,
    "relu6": F.relu6,
    "elu": F.elu,
    "mish": F.mish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "linear": _linear,
}
