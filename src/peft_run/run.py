"""A Run is a directory. Every stage is a function `stage(run, recipe, console)` that reads and writes it.

    <output.dir>/<name>/<YYYYmmdd-HHMMSS>-<id>/     and <name>/latest, which points to the newest
      config.yaml          the complete recipe; `peft train <this file>` runs it again
      config.input.yaml    as it was given           command.txt   how
      env.json             versions, machine, git, seed; data files with checksums and row counts
      status.json          state (running, done, interrupted, failed), pid, step, heartbeat
      run.log              what was said             trainer_log.jsonl   one object an event
      checkpoint-<step>/   all that a resume needs   best.json     which checkpoint is the best
      adapter_*            the result, with tokenizer, chat template and artefact.json (see peft_run.artefact)
      metrics.json         what each stage measured, by stage
      evaluation.*         .jsonl every judged sample, .npz its numbers, .md and .html to read

Nothing inside holds an absolute path of its own: a run can be moved.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft_run.config import Recipe, dump, load
from peft_run.errors import RunError, UsageError
from peft_run.files import read_json, write_json, write_text

CONFIG, STATUS, LOG, METRICS = "config.yaml", "status.json", "trainer_log.jsonl", "metrics.json"
LATEST = "latest"


class Run:
    """One run's folder. Making the object touches nothing; `create` and `open` are the ways in."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, recipe: Recipe, *, given: Path | None = None, command: str = "") -> Run:
        """A new run of this recipe, with the recipe saved in it before anything else happens."""
        group = group_of(recipe, given)
        recipe.output.name = group.name  # so that the saved recipe belongs to the same experiment
        run = cls(group / fresh_name())
        run.path.mkdir(parents=True)
        write_text(run / CONFIG, dump(recipe, run.path))
        if given is not None:
            write_text(run / "config.input.yaml", given.read_text(encoding="utf-8-sig"))
        write_text(run / "command.txt", command + "\n")
        point(group / LATEST, run.path.name)
        return run

    @classmethod
    def open(cls, path: str | os.PathLike) -> Run:
        """An existing run: its folder, a folder `latest` or `best`, or the folder of an experiment (its latest run)."""
        asked = Path(path)
        folder = follow(asked)
        if not (folder / CONFIG).is_file():
            folder = follow(folder / LATEST)
        if not (folder / CONFIG).is_file():
            raise UsageError("run.none", path=asked)
        return cls(folder.resolve())

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def recipe(self) -> Recipe:
        """The recipe that this run was made with."""
        return load(self / CONFIG)

    # -- small files ------------------------------------------------------------------------------------------------

    def write_json(self, name: str, value: Any) -> None:
        write_json(self / name, value)

    def read_json(self, name: str, default: Any = None) -> Any:
        """A JSON file of the run; `default` where it is not there."""
        try:
            return read_json(self / name)
        except FileNotFoundError:
            return default
        except ValueError as error:
            raise RunError("run.broken_file", file=self / name, problem=error) from error

    def add_metrics(self, stage: str, values: dict[str, Any]) -> None:
        """Put what a stage measured beside what others did."""
        self.write_json(METRICS, {**self.read_json(METRICS, {}), stage: values})

    def log(self, **event: Any) -> None:
        """One line of trainer_log.jsonl, the only source of curves, reports and progress pages."""
        with open(self / LOG, "a", encoding="utf-8") as file:
            file.write(json.dumps(event, ensure_ascii=False) + "\n")

    def events(self) -> list[dict[str, Any]]:
        """All log lines. A last line that a crash cut is left out."""
        try:
            lines = (self / LOG).read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        events = []
        for line in lines:
            try:
                events.append(json.loads(line))
            except ValueError:
                continue
        return events

    def cut_log(self, step: int) -> None:
        """Forget what was logged after `step`: a resumed run goes through it again."""
        if (self / LOG).exists():
            kept = [event for event in self.events() if event["step"] <= step]
            write_text(self / LOG, "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in kept))

    @property
    def trained(self) -> bool:
        """Whether the training has ended well, whatever became of later stages."""
        return "train" in self.read_json(METRICS, {})

    # -- who works on it --------------------------------------------------------------------------------------------

    def status(self, **changes: Any) -> None:
        old = self.read_json(STATUS, {})
        self.write_json(STATUS, {**old, "pid": os.getpid(), "heartbeat": round(time.time(), 1), **changes})

    @contextmanager
    def working(self, stage: str) -> Iterator[None]:
        """Holds the run for this process, and notes how the work ended."""
        with lock(self / ".lock"):
            self.status(state="running", stage=stage, started=round(time.time(), 1))
            try:
                yield
            except BaseException as error:
                interrupted = getattr(error, "exit_code", None) == 130 or isinstance(error, KeyboardInterrupt)
                self.status(state="interrupted" if interrupted else "failed", error=str(error))
                raise
            self.status(state="done", error=None)

    def checkpoints(self) -> list[Path]:
        """Oldest first. Only whole ones have their final name."""
        found = [p for p in self.path.glob("checkpoint-*") if p.name.partition("-")[2].isdigit()]
        return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


class Follower(Run):
    """A run that another process writes: what is asked of this one to write is left to that one."""

    def write_json(self, name: str, value: Any) -> None: ...

    def log(self, **event: Any) -> None: ...

    def cut_log(self, step: int) -> None: ...

    @contextmanager
    def working(self, stage: str) -> Iterator[None]:
        yield


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """One process at a time. The system lets go of it when the process ends, however it ends."""
    with open(path, "a+b") as file:
        try:
            if os.name == "nt":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError("run.busy", path=path.parent) from error
        yield


def point(pointer: Path, name: str) -> None:
    """A link to a folder beside it; a text file with its name where the system allows no links."""
    beside = pointer.with_name(f".{pointer.name}-{uuid.uuid4().hex[:8]}")
    try:
        beside.symlink_to(name)
        os.replace(beside, pointer)
    except OSError:
        beside.unlink(missing_ok=True)
        write_text(pointer, name + "\n")


def fresh_name() -> str:
    """The name of a new folder: names sort by the time at which they were made."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"


def group_of(recipe: Recipe, given: Path | None = None) -> Path:
    """The folder of an experiment's runs; without a name it has that of the recipe's file, or of the task."""
    return recipe.at(recipe.output.dir) / (recipe.output.name or (given.stem if given else recipe.task))


def follow(path: Path) -> Path:
    """Where a pointer leads; other paths lead to themselves."""
    if path.is_file() and path.name in (LATEST, "best"):
        return path.parent / path.read_text(encoding="utf-8").strip()
    return path
