"""Runs with an output layer of their own: labels, tags and spans, as `peft predict` answers them.

Each has a model of its own, since the output layer and the class of the model differ. What is equal in two of them, as
all of a common base is, lies in memory once. Requests that wait for one head are answered together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from peft_run.console import silent
from peft_run.data.questions import find, question
from peft_run.errors import RunError
from peft_run.evaluate.changes import load_tuned
from peft_run.predict import answers, questions
from peft_run.serve.worker import Worker

if TYPE_CHECKING:
    from torch import nn

    from peft_run.data.formats import Row, Sample
    from peft_run.judges.judge import Seen
    from peft_run.run import Run


class Route(NamedTuple):
    path: str
    answer: str  # what the answer is called


ROUTES = {
    "seq_cls": Route("/v1/classify", "label"),
    "token_cls": Route("/v1/token-classify", "tags"),
    "qa": Route("/v1/qa", "answer"),
}
SOURCE = Path("input")  # what messages call the rows
SAMPLED = 64  # numbers by which tensors are told apart before they are compared


class NotAnswered(RunError):
    """The model cannot read the text."""


class Head:
    """A finished run that answers rows."""

    def __init__(self, name: str, run: Run, device: str, pool: Pool) -> None:
        self.name = name
        self.recipe = run.recipe
        self.recipe.model.device, self.recipe.data.invalid = device, "error"
        self.tuned = load_tuned(run, self.recipe)
        pool.share(self.tuned.model)
        self.task, self.route = self.recipe.task, ROUTES[self.recipe.task]
        self.asked: deque[tuple[list[Sample], Future]] = deque()

    def samples(self, rows: Sequence[Row]) -> list[Sample]:
        """Raises UsageError for a row that cannot be asked."""
        format, columns = find(rows, self.recipe, {}, {}, SOURCE)
        return questions(rows, SOURCE, self.recipe, lambda row: question(row, format, columns, self.recipe))

    def ask(self, worker: Worker, samples: list[Sample]) -> Future:
        """The future of a list of Seen. Raises Busy and Closing."""
        future: Future = Future()
        self.asked.append((samples, future))
        try:
            job = worker.call(self._answer, limited=True)
        except BaseException:
            self.asked.remove((samples, future))
            raise
        job.add_done_callback(lambda job: fail(future, job.exception()))
        return future

    def _answer(self) -> None:
        """All that waits. In the worker's thread."""
        waiting = []
        while self.asked:
            samples, future = self.asked.popleft()
            if future.set_running_or_notify_cancel():
                waiting.append((samples, future))
        try:
            found = iter(self.look([sample for samples, _ in waiting for sample in samples]))
            for samples, future in waiting:
                future.set_result([next(found) for _ in samples])
        except Exception:  # one text may be to blame: each request alone
            for samples, future in waiting:
                try:
                    future.set_result(self.look(samples))
                except Exception as error:
                    future.set_exception(error)

    def look(self, samples: Sequence[Sample]) -> list[Seen]:
        return list(answers(self.tuned, samples, self.recipe, silent())) if samples else []

    def tell(self, found: Sequence[Seen]) -> list[dict[str, Any]]:
        """Raises NotAnswered where a text was too long for the run's recipe, which does not cut it."""
        if any(seen.answer is None for seen in found):
            raise NotAnswered("serve.not_answered", name=self.name)
        return [{"index": i, self.route.answer: seen.answer, **seen.more} for i, seen in enumerate(found)]


def fail(future: Future, error: BaseException | None) -> None:
    if error is not None and not future.done():
        future.set_exception(error)


class Pool:
    """Parameters of several models that nobody trains: equal ones come to share their memory."""

    def __init__(self) -> None:
        self.known: dict[tuple, list[torch.Tensor]] = {}

    def share(self, model: nn.Module) -> None:
        for tensor in model.parameters():
            alike = self.known.setdefault(mark(tensor), [])
            twin = next((other for other in alike if torch.equal(other, tensor)), None)
            if twin is None:
                alike.append(tensor.data)
            else:
                tensor.data = twin


def mark(tensor: torch.Tensor) -> tuple:
    """What equal tensors have in common, and few others."""
    flat = tensor.detach().reshape(-1)
    few = flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED]
    return (tuple(tensor.shape), tensor.dtype, tensor.device, tuple(few.cpu().double().tolist()))
