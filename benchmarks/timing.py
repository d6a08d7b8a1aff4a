"""One measurement: the clock, and the garbage collector out of the way."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

clock = time.perf_counter


def use_clock(name: str) -> None:
    """`cpu` leaves out the time another process had the core; meant for tuning on a busy machine."""
    global clock
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[name]


def seconds(work: Callable[[], object], repeat: int = 1) -> float:
    """Seconds that one call of `work` takes, over `repeat` calls without a garbage collection in between."""
    gc.collect()
    gc.disable()
    try:
        start = clock()
        for _ in range(repeat):
            work()
        return (clock() - start) / repeat
    finally:
        gc.enable()
