"""From the fields of the train page to a recipe, by the same loader as the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft_run import recipes as ready
from peft_run.config import Recipe, dump, load
from peft_run.errors import UsageError
from peft_run.files import write_text
from peft_run.ui.workspace import RECIPES, RUNS, Workspace

BLANK = "-"
# field of the page -> field of the recipe
FIELDS = {
    "task": "task",
    "model": "model.path",
    "bits": "model.quant.bits",
    "data": "data.train",
    "prompt": "data.prompt",
    "system": "data.system",
    "max_length": "data.max_length",
    "method": "adapter.method",
    "r": "adapter.r",
    "alpha": "adapter.alpha",
    "epochs": "train.epochs",
    "steps": "train.steps",
    "lr": "train.lr",
    "batch": "train.batch",
}
CLEARED = {"bits": "model.quant=null", "data": "data.train=[]", "model": "model.path="}  # others: null


def choices(workspace: Workspace, language: str) -> list[tuple[str, str]]:
    """(shown, value) of what a recipe can start from: nothing, a ready recipe, or one of the workspace."""
    found = [(ready.about(name, language), name) for name in ready.names()]
    return [*found, *((name, name) for name in workspace.recipes())]


def start(workspace: Workspace, name: str) -> Path | None:
    """The file of a choice. A ready recipe is copied into the workspace, with its data, unless it is there already."""
    if name == BLANK:
        return None
    if name in ready.names():
        folder = workspace.root / RECIPES / name
        if not folder.exists():
            ready.copy(name, folder)
        return workspace.inside(folder / ready.RECIPE)
    return workspace.inside(name)


def values_of(recipe: Recipe, workspace: Workspace) -> dict[str, Any]:
    """What the page's fields show for a recipe; paths as they are in the workspace."""
    found: dict[str, Any] = {}
    for field, name in FIELDS.items():
        value: Any = recipe
        for part in name.split("."):
            value = getattr(value, part, None)
        found[field] = value
    sources = recipe.data.train
    found["data"] = workspace.name(workspace.inside(recipe.at(sources[0].path))) if sources else None
    return found


def make(workspace: Workspace, base: Path | None, name: str, values: dict[str, Any], more: str) -> Recipe:
    """The recipe that the page describes. Raises UsageError, also for what leads out of the workspace.

    Paths in `values` and `more` start from the current folder, which is the workspace.
    """
    before = values_of(load(base), workspace) if base is not None else {}
    changes = []
    for field, path in FIELDS.items():
        value = values.get(field)
        if value in (None, ""):
            if before.get(field) not in (None, ""):
                changes.append(CLEARED.get(field, f"{path}=null"))
        elif value != before.get(field):
            changes.append(f"{path}={text(value)}")
            if field == "data":
                changes += noted(workspace, str(value))
    changes += [f"output.name={text(plain(name))}", f"output.dir={RUNS}"]
    changes += [line.strip() for line in more.splitlines() if line.strip()]
    recipe = load(base, changes)
    workspace.check(recipe)
    return recipe


def noted(workspace: Workspace, file: str) -> list[str]:
    """How the data page was told to read a file."""
    workspace.inside(file)
    known = workspace.mapping(file)
    found = [f"data.train.map.{field}={text(column)}" for field, column in known.get("map", {}).items()]
    if known.get("format", "auto") != "auto":
        found.append(f"data.train.format={known['format']}")
    return found


def plain(name: str) -> str:
    if not name.strip() or any(c in name for c in "/\\:\0") or name.startswith("."):
        raise UsageError("ui.bad_name", name=name)
    return name.strip()


def text(value: Any) -> str:
    """A value as YAML that means nothing else."""
    return json.dumps(value, ensure_ascii=False)


def yaml_of(recipe: Recipe, workspace: Workspace) -> str:
    return dump(recipe, workspace.root / RECIPES)


def place_for(workspace: Workspace, recipe: Recipe) -> Path:
    """Where the recipe is saved: under its name, or a numbered one where another recipe has that."""
    wanted = workspace.root / RECIPES / f"{recipe.output.name}.yaml"
    if wanted.is_file() and wanted.read_text(encoding="utf-8") == yaml_of(recipe, workspace):
        return workspace.inside(wanted)
    return workspace.new(RECIPES, f"{recipe.output.name}.yaml")


def save(workspace: Workspace, recipe: Recipe) -> Path:
    place = place_for(workspace, recipe)
    write_text(place, yaml_of(recipe, workspace))
    return place
