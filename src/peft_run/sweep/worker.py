"""The process that runs the trials of a sweep, one after the other, with the base model in memory.

It is a child of the sweep, so that a trial that crashes, or that the system kills for memory, takes down no more than
itself. It hears JSON lines on stdin and answers on stdout:

    {"do": "check"}                                  {"ended": "checked", "dtype": ...}
    {"do": "trial", "number": 3, "values": {...}}    {"evaluated": ...} after each evaluation, answered by {"go": bool}
                                                     {"ended": "done" | "pruned" | "failed" | "interrupted", ...}

When stdin closes, the sweep has ended or died, and so does this process, wherever it is: runs bear that.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from peft_run.run import Run
from peft_run.sweep.child import INTERRUPTED
from peft_run.sweep.folder import DONE, FAILED, PRUNED, Folder
from peft_run.sweep.settings import LOSS

if TYPE_CHECKING:
    from peft_run.console import Console

CHECKED = "checked"
PATIENCE = 30  # seconds that a worker waits for the one of a killed sweep to be gone

Tell = Callable[[dict[str, Any]], None]


class Pruned(Exception):
    """The sweep has seen enough of this trial."""


class Watched(Run):
    """A run of which each evaluation is reported as it is logged."""

    def __init__(self, path: Path, evaluated: Callable[[dict[str, Any]], None]) -> None:
        super().__init__(path)
        self.evaluated = evaluated

    def log(self, **event: Any) -> None:
        super().log(**event)
        if "eval_loss" in event:
            self.evaluated(event)


def trial(folder: Folder, number: int, point: dict[str, Any], console: Console, evaluated: Any) -> dict[str, Any]:
    """Train and judge, or go on where an earlier process stopped; what was measured."""
    from peft_run.evaluate import evaluate
    from peft_run.train import train
    from peft_run.train.loop import forget_peak

    settings = folder.settings
    run = folder.run_of(number) or Run.create(folder.trial_recipe(number, point), command="peft sweep")
    run = Watched(run.path, evaluated)
    recipe = run.recipe
    with console.copied_to(run / "run.log"):
        try:
            if not run.trained:
                forget_peak()
                train(run, recipe, console, resume=True)
            if settings.evaluate:
                evaluate(run, recipe, console, wanted=[settings.objective])
        except Pruned:
            run.status(state=PRUNED, error=None)
            return {"ended": PRUNED, "run": run.path.relative_to(folder.path).as_posix()}
    return {"ended": DONE, "run": run.path.relative_to(folder.path).as_posix(), **measured(run, settings.objective)}


def measured(run: Run, objective: str) -> dict[str, Any]:
    """What a finished trial adds to trials.jsonl."""
    from peft_run.compare.collect import Entry
    from peft_run.errors import RunError

    entry = Entry(run)
    metrics = entry.result.get("metrics", {})
    facts = entry.facts()
    value = metrics.get(objective, {}).get("tuned") if metrics or objective != LOSS else facts["eval_loss"]
    if value is None:
        raise RunError("sweep.no_value", objective=objective)
    return {
        "objective": value,
        "interval": metrics.get(objective, {}).get("tuned_interval"),
        "samples": entry.result.get("samples"),
        "measures": {name: values["tuned"] for name, values in metrics.items()},
        **facts,
    }


def check(folder: Folder) -> dict[str, Any]:
    """Refuse before the first trial what all would fail of; the number format that all will have."""
    from peft_run import base
    from peft_run.data.dataset import load_dataset
    from peft_run.errors import UsageError
    from peft_run.train.stage import make_task

    recipe = folder.recipe
    dataset = load_dataset(recipe)
    if not dataset.eval:
        raise UsageError("sweep.no_held_out")
    make_task(recipe, dataset.labels)
    dtype = base.dtype_of(recipe, base.device_of(recipe))
    return {"ended": CHECKED, "dtype": {name: own for own, name in base.DTYPES.items()}[str(dtype)[6:]]}


class Worker:
    def __init__(self, folder: Folder, console: Console, hear: Callable[[], dict[str, Any]], tell: Tell) -> None:
        self.folder, self.console, self.hear, self.tell = folder, console, hear, tell

    def work(self) -> None:
        """Do what is asked, for ever."""
        while True:
            job = self.hear()
            try:
                answer = check(self.folder) if job["do"] == "check" else self.trial(job)
            except BaseException as error:
                answer = self.failure(error)
            release()
            self.tell(answer)

    def trial(self, job: dict[str, Any]) -> dict[str, Any]:
        self.console.warnings.clear()
        return trial(self.folder, job["number"], job["values"], self.console, self.evaluated)

    def evaluated(self, event: dict[str, Any]) -> None:
        self.tell({"evaluated": event})
        if not self.hear()["go"]:
            raise Pruned

    def failure(self, error: BaseException) -> dict[str, Any]:
        from peft_run.cli import describe, exit_code

        if isinstance(error, KeyboardInterrupt) or getattr(error, "exit_code", None) == 130:
            return {"ended": INTERRUPTED}
        if not isinstance(error, Exception):
            raise error
        reason = describe(error, self.console.language)
        if is_out_of_memory(error):
            reason = self.console.text("sweep.out_of_memory", problem=reason)
        return {"ended": FAILED, "reason": reason, "exit_code": exit_code(error)}


def is_out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def release() -> None:
    """What a trial leaves behind must not count as the next one's memory."""
    gc.collect()
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def own_stdout() -> TextIO:
    """The sweep's pipe, which nothing else may print to: fd 1 becomes stderr."""
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return pipe


def lines_of(stream: TextIO) -> Callable[[], dict[str, Any]]:
    """The next message. A thread reads them, and ends the process when there can be no more."""
    inbox: queue.Queue[dict[str, Any]] = queue.Queue()

    def read() -> None:
        for line in stream:
            inbox.put(json.loads(line))
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    return inbox.get


@contextmanager
def alone(folder: Folder) -> Iterator[None]:
    """The worker of a sweep that was killed may live for a moment longer."""
    from peft_run.errors import RunError
    from peft_run.run import lock

    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with lock(folder / ".worker.lock"):
                yield
            return
        except RunError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def main(argv: list[str]) -> int:
    path, language, *switches = argv
    pipe = own_stdout()
    hear = lines_of(sys.stdin)

    def tell(message: dict[str, Any]) -> None:
        print(json.dumps(message, ensure_ascii=False), file=pipe, flush=True)

    try:
        from peft_run.console import Console
        from peft_run.kept import kept

        if "--offline" in switches:
            from peft_run.offline import go_offline

            go_offline()
        folder = Folder(Path(path))
        with alone(folder), kept():
            Worker(folder, Console(language, quiet=True), hear, tell).work()
    except KeyboardInterrupt:
        pass
    return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
