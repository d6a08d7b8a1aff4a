"""The processes that train together. Each takes its share of every batch, and all end with the same adapter.

A batch of the recipe is a batch of all processes: each computes a part of it, the sums of losses and gradients are
those of the whole batch, and so the number of processes changes the speed and not, to rounding, the result. Only the
trained tensors and a few numbers travel. The frozen base is a copy in each process or, with train.shard, one shard.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from peft_run.errors import RunError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from peft_run.config import Recipe


class World:
    """One process alone: nothing travels."""

    rank, size = 0, 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def part(self, numbers: Sequence[int]) -> tuple[Sequence[int], int]:
        """(this process's share of a batch, 1). Where nothing is left for it: (one sample to keep step with, 0)."""
        own = numbers[self.rank :: self.size]
        return (own, 1) if own else (numbers[:1], 0)

    def total(self, *values: float) -> list[float]:
        """The sum of each value over the processes."""
        return list(values)

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give every process the sum of all gradients."""

    def any(self, flag: bool) -> bool:
        return bool(self.total(float(flag))[0])

    def agreed(self, flag: Callable[[], bool]) -> Callable[[], bool]:
        """A question that all processes answer alike: yes where one says yes."""
        return lambda: self.any(flag())

    def share(self, value: Any) -> Any:
        """The first process's value."""
        return value

    def same(self, tensors: dict[str, torch.Tensor]) -> bool:
        """Whether all processes hold the same tensors, to the last bit."""
        return True

    def shard(self, model: nn.Module) -> None:
        """Split the frozen base over the processes."""

    def end(self) -> None:
        """No process goes on before all have come here."""


class Gang(World):
    """One of several processes that torchrun or accelerate has started."""

    def __init__(self, device: torch.device) -> None:
        import torch.distributed as dist

        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        self.rank, self.size, self.device = dist.get_rank(), dist.get_world_size(), device

    def total(self, *values: float) -> list[float]:
        import torch
        import torch.distributed as dist

        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """In one message. A tensor that only some processes reached counts as zero in the others."""
        import torch
        import torch.distributed as dist

        every = list(parameters)
        reached = torch.tensor(self.total(*(float(p.grad is not None) for p in every))) > 0
        used = [p for p, found in zip(every, reached.tolist(), strict=True) if found]
        if not used:
            return
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in used])
        dist.all_reduce(flat)
        for parameter, gradient in zip(used, flat.split([p.numel() for p in used]), strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype)

    def share(self, value: Any) -> Any:
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, device=cpu())
        return box[0]

    def same(self, tensors: dict[str, torch.Tensor]) -> bool:
        digest = hashlib.sha256()
        for name in sorted(tensors):
            digest.update(name.encode() + tensors[name].detach().cpu().contiguous().float().numpy().tobytes())
        own = digest.hexdigest()
        return not self.any(self.share(own) != own)

    def shard(self, model: nn.Module) -> None:
        """FSDP2 on each block of the decoder. Trained parameters stay whole: `add_gradients` sees to them.

        Embeddings and the output layer, which are used outside of the blocks, are a copy in each process.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        blocks = sharded_blocks(model)
        trained = {p for p in model.parameters() if p.requires_grad}
        mesh = init_device_mesh(self.device.type, (self.size,))
        for block in blocks:
            own = {p for p in block.parameters() if p in trained}
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=own)

    def end(self) -> None:
        import torch.distributed as dist

        dist.barrier()
        dist.destroy_process_group()


def join(recipe: Recipe) -> World:
    """The world that this process was started into."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise UsageError("world.deepspeed")
    if size == 1:
        return World()
    import torch

    from peft_run import base

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if wants_shards(recipe) and recipe.model.quant is not None:
        raise UsageError("world.quantized")
    return Gang(base.device_of(recipe))


def wants_shards(recipe: Recipe) -> bool:
    """By the recipe, or by a config file of accelerate for FSDP."""
    return recipe.train.shard or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def sharded_blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks, as the model's parts declare them, with no trained base weight in them."""
    import inspect

    from torch.distributed.fsdp import fully_shard

    from peft.integrations.parallel import _get_no_split_modules

    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise UsageError("world.old_torch")
    if not hasattr(model, "peft_config"):
        raise UsageError("world.full")
    names = _get_no_split_modules(model)
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        raise RunError("world.no_blocks", model=type(model.get_base_model()).__name__)
    return blocks


def cpu() -> torch.device:
    import torch

    return torch.device("cpu")
