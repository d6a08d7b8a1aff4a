"""Recipes to start from: one folder each, with a recipe, a small sample of data, and a guide in both languages."""

from __future__ import annotations

import difflib
from importlib.resources import files
from pathlib import Path

from peft_run.errors import UsageError

RECIPE = "recipe.yaml"


def folder() -> Path:
    return Path(str(files("peft_run.recipes")))


def names() -> list[str]:
    return sorted(path.parent.name for path in folder().glob(f"*/{RECIPE}"))


def find(name: str) -> Path:
    """The folder of a recipe. Raises UsageError with the nearest name."""
    if name in names():
        return folder() / name
    near = difflib.get_close_matches(name, names(), n=1, cutoff=0.2) or names()
    raise UsageError("recipes.none", name=name, nearest=near[0])


def about(name: str, language: str) -> str:
    """The title of its guide."""
    return guide(name, language).partition("\n")[0].lstrip("# ")


def guide(name: str, language: str) -> str:
    file = find(name) / ("guide.zh.md" if language == "zh" else "guide.md")
    return file.read_text(encoding="utf-8")


def copy(name: str, target: Path) -> list[Path]:
    """Put all its files into `target`. Raises UsageError rather than overwrite one."""
    sources = sorted(path for path in find(name).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    places = {source: target / source.relative_to(find(name)) for source in sources}
    if there := [place for place in places.values() if place.exists()]:
        raise UsageError("recipes.there_already", path=there[0])
    for source, place in places.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(source.read_bytes())
    return list(places.values())
