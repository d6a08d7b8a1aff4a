"""Ctrl-C and the polite kill signal: asked once, the work stops where it can be taken up again; twice, at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interruption() -> Iterator[Callable[[], bool]]:
    """The function says whether a signal has come. Outside the main thread none can, and nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    pressed = False

    def remember(number: int, frame: object) -> None:
        nonlocal pressed
        pressed = True
        for each, handler in before.items():
            signal.signal(each, handler)

    before = {number: signal.signal(number, remember) for number in SIGNALS}
    try:
        yield lambda: pressed
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
