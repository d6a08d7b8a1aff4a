"""A run's recipe with the few changes that make sense after training."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from peft_run.config import Recipe, load
from peft_run.config.load import parse_override
from peft_run.errors import UsageError
from peft_run.run import CONFIG, Run

if TYPE_CHECKING:
    from peft_run.artefact import Tuned

ALLOWED = ("eval", "data.test", "model.path", "model.device", "train.threads")


def split(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Runs, and changes to their recipes, from the command line."""
    paths = [word for word in args.runs if not is_override(word)]
    overrides = [word for word in args.runs if is_override(word)] + args.free
    for name, field in (("data", "data.test"), ("sample", "eval.sample")):
        if (value := getattr(args, name, None)) is not None:
            overrides.append(f"{field}={value}")
    return paths, overrides


def is_override(word: str) -> bool:
    return "=" in word and "/" not in word.partition("=")[0]


def recipe_with(path: str, overrides: Sequence[str]) -> tuple[Run, Recipe]:
    """The run, and its recipe with these changes. Raises UsageError for what belongs to the training."""
    run = Run.open(path)
    for override in overrides:
        key = ".".join(parse_override(override, run.path)[0])
        if not any(key == allowed or key.startswith(f"{allowed}.") for allowed in ALLOWED):
            raise UsageError("evaluate.fixed", key=key, allowed=", ".join(ALLOWED))
    return run, load(run / CONFIG, overrides)


def load_tuned(run: Run, recipe: Recipe) -> Tuned:
    """The tuned model. A base with a new output layer gets the one that training began with."""
    from peft_run import artefact
    from peft_run.train.loop import seed_everything

    seed_everything(recipe.train.seed, -1)
    changed = recipe.model.path != run.recipe.model.path
    path = str(recipe.at(recipe.model.path)) if changed and recipe.at(recipe.model.path).is_dir() else None
    return artefact.load(run, device=recipe.model.device, base_path=path or (recipe.model.path if changed else None))
