"""What can be learnt: one file a task. `make` gives the task of a recipe."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft_run.config import Recipe
    from peft_run.data.render import Renderer
    from peft_run.tasks.task import Task

HOMES = {  # task -> the class in peft_run/tasks
    "causal_lm": "causal_lm.CausalLM",
    "seq_cls": "seq_cls.SequenceClassification",
    "token_cls": "token_cls.TokenClassification",
    "qa": "qa.QuestionAnswering",
    "seq2seq": "seq2seq.Seq2Seq",
    "dpo": "preference.Dpo",
    "orpo": "preference.Orpo",
    "kto": "preference.Kto",
}


def make(recipe: Recipe, renderer: Renderer, labels: list[str]) -> Task:
    module, _, name = HOMES[recipe.task].partition(".")
    return getattr(importlib.import_module(f"peft_run.tasks.{module}"), name)(recipe, renderer, labels)
