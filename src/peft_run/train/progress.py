"""What a person sees of the steps: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft_run.console import Console
from peft_run.progress import bars, clock_time

LINE_EVERY = 10.0  # seconds between two plain lines
SMOOTH = 0.9


class Progress:
    """Plain lines; also the base of the live bar."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        self.console, self.total = console, total
        self.begin, self.done = time.monotonic(), done
        self.loss: float | None = None
        self.shown = 0.0

    def average(self, loss: float) -> None:
        """One batch is noisy; a running mean of about ten shows where the loss goes."""
        self.loss = loss if self.loss is None else SMOOTH * self.loss + (1 - SMOOTH) * loss

    def step(self, event: dict[str, Any]) -> None:
        self.average(event["loss"])
        now = time.monotonic()
        first, last = event["step"] == self.done + 1, event["step"] == self.total
        if first or last or now - self.shown >= LINE_EVERY:
            self.shown = now
            self.console.write(f"  {self.line(event)}")

    def evaluated(self, event: dict[str, Any]) -> None:
        measures = "  ".join(f"{name[5:]} {value:.4f}" for name, value in event.items() if name.startswith("eval_"))
        self.console("train.evaluated", step=event["step"], measures=measures)

    def line(self, event: dict[str, Any]) -> str:
        seconds = time.monotonic() - self.begin
        left = seconds / (event["step"] - self.done) * (self.total - event["step"])
        return self.console.text(
            "train.step",
            step=event["step"],
            total=self.total,
            loss=self.loss,
            lr=event["lr"],
            speed=event["tokens_per_second"],
            memory=event["memory_mb"],
            left=clock_time(left),
        )


class LiveProgress(Progress):
    def __init__(self, console: Console, total: int, done: int, bars: Any) -> None:
        super().__init__(console, total, done)
        self.bars = bars
        self.bar = bars.add_task("", total=total, completed=done)

    def step(self, event: dict[str, Any]) -> None:
        self.average(event["loss"])
        self.bars.update(self.bar, completed=event["step"], description=self.line(event))


@contextmanager
def progress(console: Console, total: int, done: int) -> Iterator[Progress]:
    if console.quiet or not console.is_terminal:
        yield Progress(console, total, done)
        return
    with bars(console.stream) as shown:
        yield LiveProgress(console, total, done, shown)
