"""What an optimizer keeps of each parameter, and what its step needs beside that."""

from collections.abc import Callable
from dataclasses import dataclass

SMALL, BLOCK = 4096, 256  # 8-bit states: tensors below SMALL numbers keep float32, others have a scale for each BLOCK


@dataclass(frozen=True)
class Optimizer:
    kept: Callable  # parameter -> bytes
    step: Callable = lambda sizes, device: 0  # (bytes of all trained parameters, device type) -> bytes


def two_states(p):
    return 2 * p.nbytes


def two_states_in_8_bits(p):
    n = p.numel()
    return 8 * n if n < SMALL else 2 * (n + 4 * -(-n // BLOCK))


def roots(sizes, device):
    """torch takes roots of the second moments: one tensor after the other, on a CPU; else of all at once."""
    return 2 * max(sizes) if device == "cpu" else sum(sizes)


OPTIMIZERS = {
    "adamw": Optimizer(two_states, roots),
    "adamw_fused": Optimizer(two_states),
    "adamw_8bit": Optimizer(two_states_in_8_bits),
    "sgd": Optimizer(lambda p: 0),
}
