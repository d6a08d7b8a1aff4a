"""Two real steps of a recipe on its longest samples: how long they take, and what memory."""

from __future__ import annotations

import tempfile
import time
from typing import TYPE_CHECKING, Any

from peft_run.errors import UsageError

if TYPE_CHECKING:
    from peft_run.config import Recipe
    from peft_run.console import Console

STEPS = 2


def probe(recipe: Recipe, console: Console) -> dict[str, Any]:
    """Seconds of the second step, and of the whole training; peak in bytes, above what there was before the model.

    Raises UsageError without data.
    """
    if not recipe.data.train:
        raise UsageError("plan.probe_needs_data")
    from peft_run import memory
    from peft_run.data.dataset import load_dataset
    from peft_run.plan.recipe import changed
    from peft_run.run import Run
    from peft_run.train.loop import Loop, forget_peak, peak_memory
    from peft_run.train.stage import make_model, make_task

    dataset = load_dataset(recipe)
    task = make_task(recipe, dataset.labels)
    items = sorted(task.encode_all(dataset.train, console), key=lambda item: item.length)
    longest = items[-recipe.train.batch * recipe.train.accumulate * STEPS :]
    with tempfile.TemporaryDirectory() as folder:
        recipe = changed(recipe, {"output.dir": folder, "output.name": "probe"})
        run = Run.create(recipe)
        before = memory.resident()
        model, dtype, added = make_model(run, recipe, task, len(items), console, resume=False)
        task.prepare(model)
        loop = Loop(run, recipe, task, model, longest, [], dtype=dtype, added=added, console=console)
        total = Loop(run, recipe, task, model, items, [], dtype=dtype, added=added, console=console).total
        if loop.device.type == "cpu":
            forget_peak()
        loop.started, loop.tokens_before = time.monotonic(), 0
        for _ in range(STEPS):
            seconds, tokens = time.monotonic(), loop.state.tokens
            loop.step()
            seconds, tokens = time.monotonic() - seconds, loop.state.tokens - tokens
    peak = peak_memory(loop.device) - (0 if loop.device.type == "cuda" else before)
    peak = max(0, peak)  # a process that gave memory back meanwhile has more than a tiny model needs
    per_step = sum(item.length for item in items) / len(items) * recipe.train.batch * recipe.train.accumulate
    return {
        "step_seconds": round(seconds, 3),
        "peak": peak,
        "steps": total,
        "seconds": round(seconds * min(1.0, per_step / max(1, tokens)) * total, 3),
    }
