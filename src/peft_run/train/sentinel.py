"""Stop at the first step that shows that nothing will be learnt, and say where it comes from."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from peft_run.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from peft_run.console import Console


def check_loss(loss: float, step: int, model: nn.Module, again: Callable[[], object]) -> None:
    """Raise RunError where a loss is not finite. `again` repeats the forward, to find the layer."""
    if not math.isfinite(loss):
        raise RunError("train.not_finite", step=step, layer=first_not_finite(model, again) or "loss")


def check_first_step(loss: float, model: nn.Module, console: Console) -> None:
    """After the first backward: a loss of 0 teaches nothing, and neither do gradients that are 0, NaN or not there."""
    if loss == 0:
        raise RunError("train.zero_loss")
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not parameters:
        raise RunError("train.nothing_trained")
    bad = [name for name, p in parameters if p.grad is not None and not torch.isfinite(p.grad).all()]
    if bad:
        raise RunError("train.gradient_not_finite", layer=bad[0], count=len(bad))
    unreached = [name for name, p in parameters if p.grad is None]
    if len(unreached) == len(parameters) or all(p.grad is None or not p.grad.any() for _, p in parameters):
        raise RunError("train.zero_gradient", layer=parameters[0][0])
    if unreached:
        console.warn("train.unreached", layer=unreached[0], count=len(unreached))


def first_not_finite(model: nn.Module, again: Callable[[], object]) -> str | None:
    """The first module, in the order of the forward, that makes a number that is not finite out of finite ones."""
    found: list[str] = []
    handles = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if not found and isinstance(first, torch.Tensor) and not torch.isfinite(first).all():
                found.append(name)

        return hook

    for name, module in model.named_modules():
        handles.append(module.register_forward_hook(watch(name)))
    try:
        with torch.no_grad():
            again()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
