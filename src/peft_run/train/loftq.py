"""LoRA on a quantized base, started from what quantizing took away from the outputs for the training data."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from peft_run.console import Console
    from peft_run.tasks.task import Batch
    from peft_run.train.loop import Loop

TOKENS = 4096  # more than most layers have inputs, and seconds of computing


def start(loop: Loop, original: str, console: Console) -> None:
    """Set A and B of the loop's model. original: the folder or hub id that its base was loaded from."""
    from peft import replace_lora_weights_loftq

    begin, model = time.monotonic(), loop.model
    batches = list(first_batches(loop))

    @torch.no_grad()
    def run_model() -> None:
        for batch in batches:
            loop.task.loss(model, batch)

    replace_lora_weights_loftq(model, original, run_model=run_model)
    console("train.loftq", tokens=sum(batch["tokens"] for batch in batches), seconds=time.monotonic() - begin)


def first_batches(loop: Loop) -> Iterator[Batch]:
    """Those that training begins with, until there are enough tokens or all samples were seen once."""
    tokens = 0
    for step in range(loop.sampler.steps_per_epoch):
        for numbers in loop.sampler.batches(step):
            batch = loop.batch(loop.items, numbers)
            yield batch
            tokens += batch["tokens"]
            if tokens >= TOKENS:
                return
