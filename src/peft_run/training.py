"""A plain training loop for the trainable parameters of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from peft_run.interruption import interruption
from peft_run.progress import Report

if TYPE_CHECKING:
    import torch

WARMUP = 0.06  # share of the steps in which the learning rate rises


def train(
    model: torch.nn.Module,
    batches: Iterable[dict[str, torch.Tensor]],
    loss_of: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    *,
    steps: int,
    learning_rate: float,
    report: Report,
) -> int:
    """Take one AdamW step per batch. Returns the steps taken: fewer than `steps` after Ctrl-C."""
    import torch

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_then_decay(step, steps))
    model.train()
    with interruption() as interrupted:
        for step, batch in zip(range(steps), batches):
            loss = loss_of(batch)
            optimizer.zero_grad()  # here: `report` may look at the gradients of the step before
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            report(loss.item(), int(batch["attention_mask"].sum()))
            if interrupted():
                return step + 1
    return steps


def warmup_then_decay(step: int, steps: int) -> float:
    """The factor on the learning rate: up to 1 over the warm-up, then down in a straight line."""
    return min((step + 1) / max(1.0, WARMUP * steps), (steps - step) / steps)
