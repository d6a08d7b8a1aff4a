"""The optimizer, its learning rate as a function of the step, and its state as tensors with names."""

from __future__ import annotations

import math
from typing import Any

import torch

from peft_run.config.schema import Train
from peft_run.packages import require

State = dict[str, torch.Tensor]


def make(parameters: dict[str, torch.nn.Parameter], train: Train) -> torch.optim.Optimizer:
    values = list(parameters.values())
    if train.optimizer == "sgd":
        return torch.optim.SGD(values, lr=train.lr, weight_decay=train.weight_decay)
    if train.optimizer == "adamw_8bit":
        require("bitsandbytes", extra="quant")
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(values, lr=train.lr, weight_decay=train.weight_decay)
    fused = all(p.device.type in ("cpu", "cuda") for p in values)
    return torch.optim.AdamW(values, lr=train.lr, weight_decay=train.weight_decay, fused=fused)


def rate(step: int, total: int, train: Train) -> float:
    """The learning rate of step 0, 1, ...: up over the warm-up, then along the schedule."""
    warmup = train.warmup * total if train.warmup < 1 else train.warmup
    if step < warmup:
        return train.lr * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1.0, total - warmup)
    if train.schedule == "constant":
        return train.lr
    if train.schedule == "linear":
        return train.lr * (1 - done)
    return train.lr * (1 + math.cos(math.pi * done)) / 2


def state_of(
    optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter]
) -> tuple[State, dict[str, Any]]:
    """(tensors, other values), both by `<parameter>|<entry>`."""
    tensors: State = {}
    values: dict[str, Any] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            (tensors if isinstance(value, torch.Tensor) else values)[f"{name}|{key}"] = value
    return tensors, values


def restore(
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, torch.nn.Parameter],
    tensors: State,
    values: dict[str, Any],
) -> None:
    """Set what `state_of` gave, bit for bit. AdamW keeps its step counts on the CPU unless it is fused on a GPU."""
    for place, value in {**tensors, **values}.items():
        name, _, key = place.rpartition("|")
        parameter = parameters[name]
        if isinstance(value, torch.Tensor):
            value = value.to(parameter.device)
        optimizer.state[parameter][key] = value
