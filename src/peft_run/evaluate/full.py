"""Against full fine-tuning: the same recipe once more with every weight trained, on the same batches in the same order.

An adapter may be worse than training everything; this measures by how much, on the same samples.
"""

from __future__ import annotations

import os
from typing import Any

from peft_run.compare import compare, page
from peft_run.config import Recipe, build
from peft_run.console import Console
from peft_run.errors import RunError, UsageError
from peft_run.evaluate.stage import evaluate
from peft_run.run import Run, group_of
from peft_run.train import train
from peft_run.train.adapter import FULL

STAGE = "against_full"
PAGE = "against_full.html"
RATE = 0.1  # of the adapter's learning rate: with every weight moving, the same rate would be far too high
NEEDS_BASE = ("dpo", "kto")  # tasks that compare with the base inside the model


def against_full(run: Run, recipe: Recipe, console: Console, *, lr: float | None = None) -> dict[str, Any]:
    """Train and judge the full counterpart of a run that has been judged. Gives what `peft compare` gives."""
    asked = full_recipe(run, recipe, lr)
    full = finished(asked)
    if full is None:
        console("full.begin", steps=asked.train.steps, lr=asked.train.lr)
        full = Run.create(asked, command=f"peft evaluate --against-full {run.path.name}")
        with console.copied_to(full / "run.log"):
            train(full, full.recipe, console)
    else:
        console("full.found", path=full.path)
    judged = full.recipe
    judged.eval, judged.data.test = recipe.eval, [s.model_copy() for s in recipe.data.test]
    for source in judged.data.test:
        source.path = str(recipe.at(source.path))
    evaluate(full, judged, console)
    result = compare([run, full])
    page.write(result, [run, full], run / PAGE, console.language)
    where = os.path.relpath(full.path, run.path)
    run.add_metrics(STAGE, {"run": where, "lr": asked.train.lr, "measures": result["measures"]})
    return result


def full_recipe(run: Run, recipe: Recipe, lr: float | None) -> Recipe:
    """The recipe with every weight trained, for as many steps as the run had. UsageError where that cannot be."""
    if recipe.adapter.method.upper() == FULL:
        raise UsageError("full.already")
    if recipe.task in NEEDS_BASE:
        raise UsageError("tasks.needs_adapter", task=recipe.task)
    steps = run.read_json("metrics.json", {}).get("train", {}).get("steps")
    if steps is None:
        raise UsageError("artefact.unfinished", path=run.path)
    values = recipe.model_dump(mode="json")
    values["adapter"] = {"method": FULL.lower()}
    values["model"]["quant"] = None
    values["train"] |= {"steps": steps, "early_stop": None, "lr": lr or RATE * recipe.train.lr}
    values["output"]["name"] = f"{recipe.output.name}-full"
    return build(values, recipe.base)


def finished(asked: Recipe) -> Run | None:
    """A finished run of this very training, if there is one."""
    for path in sorted(group_of(asked).glob("*/artefact.json"), reverse=True):
        run = Run(path.parent)
        try:
            if not path.parent.is_symlink() and training_of(run.recipe) == training_of(asked):
                return run
        except RunError:  # a recipe of another version
            continue
    return None


def training_of(recipe: Recipe) -> dict[str, Any]:
    """What decides the result of a training, with paths that can be compared."""
    values = recipe.model_dump(mode="json", exclude={"output", "eval", "track"})
    values["data"].pop("test")
    for source in [*values["data"]["train"], values["data"]["eval"]]:
        source["path"] = source["path"] and str(recipe.at(source["path"]))
    if recipe.at(recipe.model.path).exists():
        values["model"]["path"] = str(recipe.at(recipe.model.path))
    return values
