"""The thread in which all that touches a model is done, one thing after the other."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from peft_run.errors import RunError
from peft_run.serve.metrics import Metrics


class Busy(RunError):
    """The queue is full."""


class Closing(RunError):
    """The server takes no new requests."""


class Worker:
    """Does what `call` asks for. A subclass has further work, a step at a time."""

    def __init__(self, *, queue: int = 64) -> None:
        self.queue = queue
        self.metrics = Metrics()
        self.jobs: deque[tuple[Callable[[], Any], Future]] = deque()
        self.closing = self.ended = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    # -- for all threads ----------------------------------------------------------------------------------------------

    def start(self) -> Worker:
        self.thread.start()
        return self

    @property
    def alive(self) -> bool:
        return self.thread.is_alive() and not self.closing

    def call(self, work: Callable[[], Any], *, limited: bool = False) -> Future:
        """Run something in the thread between two steps. limited: it counts against the queue's limit."""
        future: Future = Future()
        with self.changed:
            self.check_open(1 if limited else 0)
            self.jobs.append((work, future))
            self.changed.notify()
        return future

    def close(self, timeout: float | None = None) -> bool:
        """Take nothing new, finish what there is; after `timeout` seconds cancel the rest. Whether all finished."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.thread.join(timeout)
        finished = not self.thread.is_alive()
        with self.changed:
            self.ended = True
            self.changed.notify()
        self.thread.join()
        return finished

    def check_open(self, more: int) -> None:
        """Raises Closing, or Busy where `more` do not fit into the queue."""
        if self.closing or not self.thread.is_alive():
            raise Closing("serve.closing")
        if more and self.queued() + more > self.queue:
            raise Busy("serve.busy", limit=self.queue)

    def gauges(self) -> dict[str, float]:
        """What /metrics tells of this moment."""
        return {"jobs_waiting": len(self.jobs)}

    # -- for subclasses -----------------------------------------------------------------------------------------------

    def queued(self) -> int:
        """How much waits."""
        return len(self.jobs)

    def idle(self) -> bool:
        return not self.jobs

    def step(self) -> None:
        self.do_jobs()

    def give_up(self) -> None:
        """The end has come: tell all that still wait."""
        for _, future in self.jobs:
            future.set_exception(Closing("serve.closing"))

    # -- the thread ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _loop(self) -> None:
        while True:
            with self.changed:
                while self.idle() and not self.closing:
                    self.changed.wait()
                if self.ended or (self.closing and self.idle()):
                    break
            self.step()
        self.give_up()

    def do_jobs(self) -> None:
        while self.jobs:
            work, future = self.jobs.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
