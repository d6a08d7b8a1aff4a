"""The one folder that the page may touch, and what is in it. Every path that a browser sends comes through `inside`.

<workspace>/
  data/     uploaded files            recipes/  recipes written by the page
  runs/     runs                      exports/  merged and exported models
  .jobs/    commands that were started (see jobs.py)        .uploads/  what browsers are sending
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from peft_run.errors import UsageError
from peft_run.files import read_json, write_json

if TYPE_CHECKING:
    from peft_run.config import Recipe
    from peft_run.run import Run

DATA, RECIPES, RUNS, EXPORTS = "data", "recipes", "runs", "exports"
JOBS, UPLOADS = ".jobs", ".uploads"
MAPPINGS = "data/.mappings.json"  # how the data page was told to read a file
VOTES = "votes.jsonl"
NAME = re.compile(r"[^\w.\-]+")
DEEPEST = 4  # folders between the workspace and a run
LONGEST_NAME = 100


class Workspace:
    """`root` is made if it is not there."""

    def __init__(self, root: str | os.PathLike) -> None:
        self.root = Path(os.path.realpath(root))
        for folder in (DATA, RECIPES, RUNS, EXPORTS, JOBS, UPLOADS):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        (self.root / JOBS).chmod(0o700)  # keys of servers stand in there

    # -- the rule -----------------------------------------------------------------------------------------------------

    def inside(self, given: str | os.PathLike) -> Path:
        """The real path of what a browser named, relative to the workspace. Links are followed first.

        Raises UsageError for all that is outside, for hidden files and folders, and for names that are no paths.
        """
        text = os.fspath(given)
        try:
            if not isinstance(text, str) or not text.strip() or "\0" in text:
                raise ValueError
            path = os.path.realpath(os.path.join(self.root, text))
            if os.path.commonpath([self.root, path]) != str(self.root):
                raise ValueError
            parts = Path(path).relative_to(self.root).parts
        except (ValueError, OSError) as error:
            raise UsageError("ui.outside", path=repr(given)) from error
        if any(part.startswith(".") for part in parts):
            raise UsageError("ui.outside", path=repr(given))
        return Path(path)

    def name(self, path: Path) -> str:
        """A path inside as the page shows it, and as commands get it: they run in the workspace."""
        return path.relative_to(self.root).as_posix()

    def new(self, folder: str, wanted: str, suffix: str = "") -> Path:
        """A free place in `folder`, called `wanted` with what is no plain name taken out, and numbered if need be."""
        plain = NAME.sub("-", os.path.basename(wanted.replace("\\", "/"))).strip(".-")
        stem, own = os.path.splitext(plain)
        stem, suffix = stem[:LONGEST_NAME] or "unnamed", suffix or own[:LONGEST_NAME]
        place = self.root / folder / f"{stem}{suffix}"
        number = 2
        while place.exists():
            place = self.root / folder / f"{stem}-{number}{suffix}"
            number += 1
        return self.inside(place)

    def check(self, recipe: Recipe) -> None:
        """Refuse a recipe that reads or writes outside of the workspace, or that would run a model's own code."""
        if recipe.model.trust_remote_code:
            raise UsageError("ui.remote_code")
        sources = [*recipe.data.train, recipe.data.eval, *recipe.data.test]
        paths = [source.path for source in sources if source.path is not None]
        paths.append(recipe.output.dir)
        if recipe.data.template not in ("auto", "tokenizer", "plain"):
            paths.append(recipe.data.template)
        if recipe.eval.forgetting not in ("auto", "none"):
            paths.append(recipe.eval.forgetting)
        for path in paths:
            self.inside(recipe.at(path))
        for model in (recipe.model.path, recipe.model.tokenizer):
            if model:
                self.check_model(model, recipe.at(model))

    def check_model(self, path: str, place: Path | None = None) -> None:
        """A model may also be a hub id, or a folder of $PEFT_ASSETS, which whoever started the page has chosen.

        place: where the recipe has it; in the workspace if None.
        """
        place = place or self.root / path
        try:
            is_name = not (os.path.isabs(path) or path.startswith("~") or ".." in Path(path).parts)
            if is_name and not place.exists():
                return
            assets = os.environ.get("PEFT_ASSETS")
            if assets and Path(os.path.realpath(place)).is_relative_to(os.path.realpath(assets)):
                return
        except (ValueError, OSError) as error:
            raise UsageError("ui.outside", path=repr(path)) from error
        self.inside(place)

    # -- what is there ------------------------------------------------------------------------------------------------

    def data_files(self) -> list[str]:
        from peft_run.data.read import READERS

        found = [path for path in self.visible(DATA) if path.suffix.lower() in READERS]
        return [self.name(path) for path in newest_first(found)]

    def recipes(self) -> list[str]:
        found = [path for path in self.visible(RECIPES) if path.suffix in (".yaml", ".yml")]
        return [self.name(path) for path in newest_first(found)]

    def visible(self, folder: str) -> Iterator[Path]:
        for path in (self.root / folder).rglob("*"):
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(self.root).parts):
                yield path

    def runs(self) -> list[str]:
        """Folders of runs, newest first. They are found by what is in them, wherever they were written."""
        found = [Path(folder) for folder in self._runs(self.root, DEEPEST)]
        return [self.name(path) for path in sorted(found, key=lambda path: (path.name, str(path)), reverse=True)]

    def _runs(self, folder: Path, depth: int) -> Iterator[str]:
        with os.scandir(folder) as entries:
            below = [e.path for e in entries if not e.name.startswith(".") and e.is_dir(follow_symlinks=False)]
        for path in below:
            if os.path.isfile(os.path.join(path, "config.yaml")) and os.path.isfile(os.path.join(path, "command.txt")):
                yield path
            elif depth > 1:
                yield from self._runs(Path(path), depth - 1)

    def finished(self) -> list[str]:
        return [name for name in self.runs() if (self.root / name / "artefact.json").is_file()]

    def run(self, name: str) -> Run:
        from peft_run.run import Run

        return Run.open(self.inside(name))

    def models(self) -> list[str]:
        """Folders of models that a recipe here may name: those of the workspace, and of $PEFT_ASSETS by their names."""
        found = [self.name(path.parent) for path in sorted(self.root.glob("models/*/config.json"))]
        assets = os.environ.get("PEFT_ASSETS")
        if assets:
            found += [path.parent.name for path in sorted(Path(assets).glob("*/config.json"))]
        return found

    def sweeps(self) -> list[str]:
        """Folders of sweeps, newest first."""
        found = [path.parent for path in (self.root / RUNS).glob("*/sweep-*/sweep.yaml")]
        return [self.name(path) for path in newest_first(found)]

    def exports(self) -> list[str]:
        found = [path for path in (self.root / EXPORTS).iterdir() if path.is_dir() and not path.name.startswith(".")]
        return [self.name(path) for path in newest_first(found)]

    # -- how a data file is to be read ---------------------------------------------------------------------------------

    def mapping(self, file: str) -> dict[str, object]:
        """What the data page noted of a file: task, format, map."""
        try:
            return read_json(self.root / MAPPINGS).get(file, {})
        except (FileNotFoundError, ValueError):
            return {}

    def note_mapping(self, file: str, values: dict[str, object]) -> None:
        try:
            known = read_json(self.root / MAPPINGS)
        except (FileNotFoundError, ValueError):
            known = {}
        write_json(self.root / MAPPINGS, {**known, file: values})


def newest_first(paths: list[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)
