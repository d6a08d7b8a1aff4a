"""How far a stage is that works through a number of things: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from peft_run.console import Console
from peft_run.progress import bars, clock_time

LINE_EVERY = 10.0  # seconds


@contextmanager
def counted(console: Console, total: int) -> Iterator[Callable[[int], None]]:
    """Gives a function to call with how many more are done."""
    begin = shown = time.monotonic()
    done = 0

    def text() -> str:
        left = (time.monotonic() - begin) / max(done, 1) * (total - done)
        return console.text("waiting.done", done=done, total=total, left=clock_time(left))

    if console.quiet or not console.is_terminal:

        def line(more: int) -> None:
            nonlocal done, shown
            done += more
            if time.monotonic() - shown >= LINE_EVERY:
                shown = time.monotonic()
                console.write(f"  {text()}")

        yield line
        return
    with bars(console.stream, transient=True) as drawn:
        bar = drawn.add_task("", total=total)

        def draw(more: int) -> None:
            nonlocal done
            done += more
            drawn.update(bar, completed=done, description=text())

        yield draw
