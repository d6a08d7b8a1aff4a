"""What a person sees while a command works: lines of text, and a bar where the output is a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

LINE_EVERY = 10  # steps between two lines where there is no terminal

Report = Callable[[float, int], None]  # called after every step with its loss and its number of tokens


def bars(stream: TextIO, bar_width: int = 20, *, transient: bool = False):  # -> rich.progress.Progress
    """A bar and a line of text beside it, on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = TextColumn("  "), BarColumn(bar_width=bar_width), TextColumn("{task.description}")
    return Progress(*columns, console=Console(file=stream), transient=transient)


class Output:
    """Text for people. With `--json` it goes to stderr, because stdout then belongs to the result."""

    def __init__(self, *, to_stderr: bool) -> None:
        self.stream: TextIO = sys.stderr if to_stderr else sys.stdout

    def say(self, text: str = "") -> None:
        print(text, file=self.stream, flush=True)

    @contextmanager
    def steps(self, total: int) -> Iterator[Report]:
        clock = StepClock(total)
        if not self.stream.isatty():

            def line(loss: float, tokens: int) -> None:
                clock.tick(loss, tokens)
                if clock.step % LINE_EVERY == 0 or clock.step in (1, total):
                    self.say(f"  {clock}")

            yield line
            return

        with bars(self.stream, 40) as shown:
            bar = shown.add_task(str(clock), total=total)

            def draw(loss: float, tokens: int) -> None:
                clock.tick(loss, tokens)
                shown.update(bar, advance=1, description=str(clock))

            yield draw


class StepClock:
    """Counts steps and tokens; its text is the state of the training in one line."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.step = 0
        self.tokens = 0
        self.loss: float | None = None
        self.start = time.monotonic()

    def tick(self, loss: float, tokens: int) -> None:
        self.step += 1
        self.tokens += tokens
        # One batch is noisy; a running mean of about ten shows where the loss goes.
        self.loss = loss if self.loss is None else 0.9 * self.loss + 0.1 * loss

    def __str__(self) -> str:
        if self.loss is None:
            return f"step 0/{self.total}"
        seconds = time.monotonic() - self.start
        left = seconds / self.step * (self.total - self.step)
        return (
            f"step {self.step}/{self.total}  loss {self.loss:.3f}  {self.tokens / seconds:.0f} tokens/s  "
            f"{clock_time(left)} left"
        )


def clock_time(seconds: float) -> str:
    return f"{round(seconds) // 60}:{round(seconds) % 60:02d}"
