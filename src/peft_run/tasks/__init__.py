"""What can be learnt: one file a task. `make` gives the task of a recipe."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft_run.config import Recipe
    from peft_run.data.render import Renderer
    from peft_run.tasks.task import Task

HOMES = {
    "causal_lm": "causal_lm",
    "seq_cls": "seq_cls",
}


def make(recipe: Recipe, renderer: Renderer, labels: list[str]) -> Task:
    module = importlib.import_module(f"peft_run.tasks.{HOMES[recipe.task]}")
    return module.TASK(recipe, renderer, labels)
