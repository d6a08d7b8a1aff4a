"""The sweep itself: it begins trials, hears how they end, and writes it down. No model is in this process."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft_run
from peft_run.config import Recipe
from peft_run.console import Console
from peft_run.errors import Interrupted, RunError, UsageError
from peft_run.interruption import interruption
from peft_run.messages import sentence
from peft_run.progress import clock_time
from peft_run.run import lock
from peft_run.sweep import report, search
from peft_run.sweep.folder import FAILED, LOCK, PRUNED, STARTED, WORKER_LOG, Folder
from peft_run.sweep.search import ENDED
from peft_run.sweep.settings import Settings
from peft_run.sweep.space import Point, Space, label_of

INTERRUPTED = "interrupted"
TICK = 0.2  # seconds between two looks at whether somebody wants to stop


def start(
    settings: Settings,
    recipe: Recipe,
    console: Console,
    *,
    given: Path | None = None,
    command: str = "",
    offline: bool = False,
) -> Folder:
    """A new sweep, to its end. Raises UsageError, and leaves nothing behind, for what no trial could bear."""
    space = Space(settings, recipe)
    search.check(settings, space)
    folder = Folder.create(settings, recipe, given=given, command=command)
    with Worker(folder, console.language, offline) as worker:
        try:
            with interruption() as interrupted:
                answer = worker.ask({"do": "check"}, lambda event: True, interrupted)
            if answer["ended"] == INTERRUPTED:
                raise KeyboardInterrupt
            if "dtype" not in answer:
                raise (UsageError if answer.get("exit_code") == 2 else RunError)(answer["reason"])
        except BaseException:
            worker.end()
            shutil.rmtree(folder.path, ignore_errors=True)
            raise
        fixed = folder.recipe
        fixed.model.dtype = answer["dtype"]  # "auto" is measured, and must not come out differently between trials
        folder.write(settings, fixed)
        go(folder, worker, console)
    return folder


def resume(path: Path, console: Console, *, offline: bool = False) -> Folder:
    """Go on with a sweep: finished trials stay, an unfinished one continues from its checkpoint."""
    folder = Folder.open(path)
    with Worker(folder, console.language, offline) as worker:
        go(folder, worker, console)
    return folder


def go(folder: Folder, worker: Worker, console: Console) -> None:
    """All trials that are left. Raises Interrupted after Ctrl-C, and RunError where every trial failed."""
    settings = folder.settings
    with lock(folder / LOCK), interruption() as interrupted:
        plan = search.make(folder, settings, Space(settings, folder.recipe))
        over = sum(trial["state"] in ENDED for trial in folder.trials().values())
        console("sweep.begin", path=folder.path, left=max(0, plan.total - over), total=plan.total)
        begin, done = time.monotonic(), 0
        try:
            for number, point in plan.upcoming():
                folder.log(number, STARTED, values=point, time=round(time.time(), 1))
                console("sweep.trial", number=number, total=plan.total, point=label_of(point))
                result = one(plan, worker, number, point, console, interrupted)
                if result is None:
                    raise Interrupted("sweep.interrupted", path=folder.path)
                folder.log(number, **result, time=round(time.time(), 1))
                plan.ended(number, result)
                done += 1
                left = clock_time((time.monotonic() - begin) / done * (plan.total - over - done))
                say_end(result, settings, left, console)
                if interrupted():
                    raise Interrupted("sweep.interrupted", path=folder.path)
        finally:
            report.write(folder, console.language)
    trials = list(folder.trials().values())
    if all(trial["state"] == FAILED for trial in trials):
        raise RunError("sweep.all_failed", count=len(trials), reason=trials[0]["reason"], path=folder.path)


def one(
    plan: search.Search,
    worker: Worker,
    number: int,
    point: Point,
    console: Console,
    interrupted: Callable[[], bool],
) -> dict[str, Any] | None:
    """A trial in the worker: what goes into trials.jsonl, or None where it was interrupted."""

    def evaluated(event: dict[str, Any]) -> bool:
        console("sweep.evaluated", step=event["step"], total=event["total"], loss=event["eval_loss"])
        return plan.evaluated(number, event)

    answer = worker.ask({"do": "trial", "number": number, "values": point}, evaluated, interrupted)
    state = answer.pop("ended")
    if state == INTERRUPTED:
        return None
    answer.pop("exit_code", None)
    return {"state": state, **answer}


def say_end(result: dict[str, Any], settings: Settings, left: str, console: Console) -> None:
    if result["state"] == FAILED:
        console.warn("sweep.failed", reason=result["reason"])
    elif result["state"] == PRUNED:
        console("sweep.pruned", left=left)
    else:
        name, value = settings.objective, result["objective"]
        console("sweep.ended", objective=name, value=value, seconds=result["seconds"], left=left)


class Worker:
    """The child process; begun anew where it has died. `with` ends it."""

    def __init__(self, folder: Folder, language: str, offline: bool) -> None:
        self.folder = folder
        self.command = [sys.executable, "-m", "peft_run.sweep.worker", str(folder.path), language]
        self.command += ["--offline"] if offline else []
        self.language = language
        self.process: subprocess.Popen[str] | None = None
        self.inbox: queue.Queue[str | None] = queue.Queue()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()

    def begin(self) -> subprocess.Popen[str]:
        """In a session of its own: Ctrl-C in the terminal reaches the sweep alone, which passes it on once."""
        source = str(Path(peft_run.__file__).parents[1])
        path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
        with open(self.folder / WORKER_LOG, "ab") as log:
            process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": path},
            )
        self.inbox = inbox = queue.Queue()

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                inbox.put(line)
            inbox.put(None)

        threading.Thread(target=read, daemon=True).start()
        return process

    def ask(
        self, job: dict[str, Any], evaluated: Callable[[dict[str, Any]], bool], interrupted: Callable[[], bool]
    ) -> dict[str, Any]:
        """Have a job done. A worker that dies of it is an answer too: `failed`, with the reason."""
        if self.process is None or self.process.poll() is not None:
            self.process = self.begin()
        self.send(job)
        told = False
        while True:
            if interrupted() and not told:
                self.process.send_signal(signal.SIGINT)
                told = True
            try:
                line = self.inbox.get(timeout=TICK)
            except queue.Empty:
                continue
            if line is None:
                self.process.wait()
                return {"ended": INTERRUPTED} if told else {"ended": FAILED, "reason": self.death()}
            message = json.loads(line)
            if "ended" in message:
                return message
            self.send({"go": evaluated(message["evaluated"])})

    def send(self, message: dict[str, Any]) -> None:
        assert self.process is not None and self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has just died: `ask` hears so
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()

    def death(self) -> str:
        """Why the process has ended, in a sentence."""
        assert self.process is not None
        code = self.process.returncode
        if code == -signal.SIGKILL:
            return sentence("sweep.killed", self.language)
        if code < 0:
            return sentence("sweep.signal", self.language, name=signal.Signals(-code).name)
        lines = (self.folder / WORKER_LOG).read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return sentence("sweep.died", self.language, code=code, last=last)

    def end(self) -> None:
        """It ends when its stdin does."""
        if self.process is None or self.process.stdin is None:
            return
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process = None
