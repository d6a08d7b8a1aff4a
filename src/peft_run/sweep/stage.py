"""The sweep itself: it begins trials, hears how they end, and writes it down. No model is in this process."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft_run.config import Recipe
from peft_run.console import Console
from peft_run.errors import Interrupted, RunError, UsageError
from peft_run.interruption import interruption
from peft_run.progress import clock_time
from peft_run.run import lock
from peft_run.sweep import report, search
from peft_run.sweep.child import INTERRUPTED, Child
from peft_run.sweep.folder import FAILED, LOCK, PRUNED, STARTED, Folder
from peft_run.sweep.search import ENDED
from peft_run.sweep.settings import Settings
from peft_run.sweep.space import Point, Space, label_of


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
    settings.axes |= space.lists()  # as the recipe reads them: 1e-4 is a number
    folder = Folder.create(settings, recipe, given=given, command=command)
    with Child(folder, console.language, offline) as worker:
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
    with Child(folder, console.language, offline) as worker:
        go(folder, worker, console)
    return folder


def go(folder: Folder, worker: Child, console: Console) -> None:
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
    worker: Child,
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
