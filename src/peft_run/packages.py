"""Data files that live inside installed packages, found without importing or running those packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from peft_run.errors import MissingPackage, RunError


def package_file(package: str, pattern: str, *, extra: str) -> Path:
    """The one file under `package` that matches the glob `pattern`."""
    # For a top-level name find_spec only looks for the files; nothing of the package is executed.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackage(package.replace("_", "-"), extra)
    found = [path for folder in spec.submodule_search_locations for path in sorted(Path(folder).glob(pattern))]
    if len(found) != 1:
        raise RunError(f"Expected one file {pattern} inside the package `{package}`, found {len(found)}.")
    return found[0]


def require(package: str, *, extra: str) -> None:
    """Fail early, with the command that helps, where `package` is not installed."""
    if importlib.util.find_spec(package) is None:
        raise MissingPackage(package, extra)
