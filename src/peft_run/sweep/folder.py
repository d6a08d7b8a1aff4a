"""A sweep is a directory, and everything in it is a run or a small file.

    <output.dir>/<name>/sweep-<YYYYmmdd-HHMMSS>-<id>/
      sweep.yaml        the settings, complete       command.txt   how it was started
      recipe.yaml       what the trials vary, complete
      trials.jsonl      one object whenever a trial begins or ends, written to the disk before the next
      trials/<number>/  the runs of a trial, made by `train` and `evaluate` like any other
      study.db          Optuna's, with search: tpe   worker.log    what the libraries said
      report.html, .md  what came of it              plots/        its charts

Nothing inside holds an absolute path of its own: a sweep can be moved.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from peft_run.config import Recipe, dump, load
from peft_run.errors import UsageError
from peft_run.files import write_text
from peft_run.run import Run, fresh_name, group_of
from peft_run.sweep.settings import Settings, load_settings
from peft_run.sweep.space import Point, recipe_at

SETTINGS, RECIPE, TRIALS = "sweep.yaml", "recipe.yaml", "trials.jsonl"
RUNS, WORKER_LOG, LOCK = "trials", "worker.log", ".lock"

STARTED, DONE, PRUNED, FAILED = "started", "done", "pruned", "failed"


class Folder:
    """One sweep's folder. Making the object touches nothing; `create` and `open` are the ways in."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, settings: Settings, recipe: Recipe, *, given: Path | None = None, command: str = "") -> Folder:
        group = group_of(recipe, given)
        if settings.name is not None:
            group = group.with_name(settings.name)
        settings.name = recipe.output.name = group.name
        folder = cls(group / f"sweep-{fresh_name()}")
        folder.path.mkdir(parents=True)
        folder.write(settings, recipe)
        write_text(folder / "command.txt", command + "\n")
        return folder

    @classmethod
    def open(cls, path: str | os.PathLike) -> Folder:
        """An existing sweep, or the newest in the folder of an experiment."""
        asked = Path(path)
        found = [asked, *sorted(asked.glob("sweep-*"), reverse=True)]
        for folder in found:
            if (folder / SETTINGS).is_file() and (folder / RECIPE).is_file():
                return cls(folder.resolve())
        raise UsageError("sweep.none", path=asked)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def write(self, settings: Settings, recipe: Recipe) -> None:
        write_text(self / RECIPE, dump(recipe, self.path))
        write_text(self / SETTINGS, settings.dump())

    @property
    def settings(self) -> Settings:
        return load_settings(self / SETTINGS)

    @property
    def recipe(self) -> Recipe:
        return load(self / RECIPE)

    # -- trials -------------------------------------------------------------------------------------------------------

    def log(self, number: int, state: str, **more: Any) -> None:
        """A line of trials.jsonl, on the disk when this returns."""
        line = json.dumps({"trial": number, "state": state, **more}, ensure_ascii=False) + "\n"
        with open(self / TRIALS, "a+b") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a crash cut the last line, which must not swallow this one
                    line = "\n" + line
            file.write(line.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())

    def trials(self) -> dict[int, dict[str, Any]]:
        """number -> the newest that is known of a trial, in the order in which they began."""
        try:
            lines = (self / TRIALS).read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return {}
        found: dict[int, dict[str, Any]] = {}
        for line in lines:
            try:
                event = json.loads(line)
                found[event["trial"]] = {**found.get(event["trial"], {}), **event}
            except (ValueError, TypeError, KeyError):
                continue
        return found

    def run_of(self, number: int) -> Run | None:
        """The newest run of a trial; None where it has none, or a crash left one without a recipe."""
        try:
            return Run.open(self / RUNS / f"{number:04d}")
        except UsageError:
            return None

    def recipe_of(self, point: Point) -> Recipe:
        """The recipe of a trial as somebody would run it alone."""
        return recipe_at(self.recipe, point)

    def trial_recipe(self, number: int, point: Point) -> Recipe:
        """The same as the sweep runs it: below its folder, judged on the held-out part.

        The test data stays unseen, for whoever judges the winner; the base, which is the same for all, is not scored
        again and again.
        """
        recipe = self.recipe_of(point)
        recipe.output.dir, recipe.output.name = RUNS, f"{number:04d}"
        recipe.data.test = []
        recipe.eval.baseline, recipe.eval.forgetting = False, "none"
        recipe.track.plots = False
        return recipe
