"""A base model that is read from the disk once, for programs that tune it many times.

Each taker gets modules of its own over the same weights, which adapters leave as they are. What changes them in place
all the same (trained biases, a method that splits the base) is found out by a checksum before the next one takes them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


class Keeper:
    """Holds one model: the one that was asked for last."""

    def __init__(self) -> None:
        self.key: Any = None
        self.model: nn.Module | None = None
        self.reads = 0

    def take(self, key: tuple[Any, ...], read: Callable[[], nn.Module]) -> nn.Module:
        """The model of this key, as `read` would make it; random numbers go on as after reading it."""
        import torch

        # New output layers start from random numbers: the same model only from the same state.
        key = (*key, torch.get_rng_state().numpy().tobytes())
        if self.model is None or key != self.key or checksum(self.model) != self.sum:
            self.model = None  # before the next one is read: two would need twice the memory
            self.model, self.key, self.reads = read(), key, self.reads + 1
            self.sum, self.state_after = checksum(self.model), torch.get_rng_state()
        torch.set_rng_state(self.state_after)
        return twin(self.model)


keeper: Keeper | None = None


@contextmanager
def kept() -> Iterator[Keeper]:
    """Meanwhile `base.load_base` reads a model once."""
    global keeper
    keeper = Keeper()
    try:
        yield keeper
    finally:
        keeper = None


def twin(model: nn.Module) -> nn.Module:
    """The same modules anew, with the same weights in the same memory."""
    from torch import nn

    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        same = tensor.detach()
        memo[id(tensor)] = nn.Parameter(same, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else same
    return copy.deepcopy(model, memo)


def checksum(model: nn.Module) -> int:
    """Of the bits of all weights."""
    return sum(i * bits(t) for i, t in enumerate((*model.parameters(), *model.buffers()), 1))


def bits(tensor: torch.Tensor) -> int:
    import torch

    numbers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return int(tensor.detach().view(numbers[tensor.element_size()]).sum(dtype=torch.int64))
