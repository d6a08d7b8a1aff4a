"""The evaluation stage: base and tuned over the same samples in one pass, and how sure the difference is."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peft_run import judges
from peft_run.config import Recipe
from peft_run.config.schema import HEADS
from peft_run.console import Console, silent
from peft_run.data.dataset import key_of, load_dataset, load_test
from peft_run.errors import RunError, UsageError
from peft_run.evaluate import forgetting, report, results
from peft_run.evaluate.changes import load_tuned
from peft_run.evaluate.sides import UNTRAINED, Sides
from peft_run.packages import require
from peft_run.run import Run
from peft_run.waiting import counted

if TYPE_CHECKING:
    from peft_run.data.formats import Sample
    from peft_run.judges.judge import Judge, Seen

STAGE = "evaluate"


def evaluate(
    run: Run, recipe: Recipe | None = None, console: Console | None = None, *, wanted: Sequence[str] = ()
) -> dict[str, Any]:
    """Judge a finished run; what was measured, as in metrics.json.

    `recipe` may differ from the run's in `eval`, `data.test` and the model's place. `wanted` are names of measures that
    somebody asks for: an unknown one is refused before the work begins.
    """
    console = console or silent()
    require("transformers", extra="run")
    recipe = recipe or run.recipe
    with run.working(STAGE):
        return work(run, recipe, console, wanted)


def work(run: Run, recipe: Recipe, console: Console, wanted: Sequence[str]) -> dict[str, Any]:
    if recipe.train.threads is not None:
        import torch

        torch.set_num_threads(recipe.train.threads)
    tuned = load_tuned(run, recipe)
    samples, source = samples_of(recipe, tuned.labels)
    notes = remarks(recipe, samples, source, console)
    texts = forgetting.texts_of(recipe) if tuned.recipe.task not in (*HEADS, "seq2seq") else {}
    judge = judges.make(tuned, samples, recipe.eval, console)
    measures = results.chosen(judge, recipe.eval.metrics)
    results.check_wanted(wanted, measures, texts)
    sides = Sides(tuned, with_base=recipe.eval.baseline)
    if sides.kind == UNTRAINED:
        notes.append({"note": "evaluate.untrained_head"})
    if recipe.eval.baseline and sides.kind is None:
        notes.append({"note": "evaluate.no_base"})
    console("evaluate.start", count=len(samples), source=source, sides=" + ".join(sides.names))
    seen = look(judge, sides, console)
    if texts:
        console("evaluate.forgetting")
    found = results.Results(judge, sides.names, seen, measures)
    result = {
        "samples": len(samples),
        "source": source,
        "base": sides.kind,
        **found.summary(),
        "forgetting": forgetting.forgetting(tuned, sides, texts),
        "notes": notes,
    }
    report.write(run, result, found, console)
    run.add_metrics(STAGE, result)
    return result


def samples_of(recipe: Recipe, labels: list[str]) -> tuple[list[Sample], str]:
    """What is judged, and where it is from: `test` or `held_out`."""
    samples = load_test(recipe, labels)
    if not samples:
        raise UsageError("evaluate.no_data")
    most = recipe.eval.sample
    if most is not None and most < len(samples):
        kept = sorted(random.Random(recipe.data.seed).sample(range(len(samples)), most))
        samples = [samples[i] for i in kept]
    return samples, "test" if recipe.data.test else "held_out"


def remarks(recipe: Recipe, samples: Sequence[Sample], source: str, console: Console) -> list[dict[str, Any]]:
    """What takes away from the figures: keys of sentences, with their values."""
    notes: list[dict[str, Any]] = []
    if source == "held_out" and recipe.train.keep == "best":
        notes.append({"note": "evaluate.not_blind"})
    try:
        known = {key_of(sample) for sample in load_dataset(recipe).train}
    except (RunError, OSError):  # an evaluation may run where the training data is not
        notes.append({"note": "evaluate.leak_unknown"})
        return notes
    if leaked := sum(key_of(sample) in known for sample in samples):
        console.warn("evaluate.leaked", count=leaked, total=len(samples))
        notes.append({"note": "evaluate.leaked", "count": leaked, "total": len(samples)})
    return notes


def look(judge: Judge, sides: Sides, console: Console) -> dict[str, list[Seen]]:
    """side -> what it makes of each sample. Both look at a batch before the next one comes."""
    seen: dict[str, list[Any]] = {side: [None] * len(judge.samples) for side in sides.names}
    with counted(console, len(judge.samples) * len(sides.names)) as count:
        for numbers in judge.batches():
            for side in sides.names:
                with sides.on(side) as model:
                    for number, one in zip(numbers, judge.look(model, numbers), strict=True):
                        seen[side][number] = one
                count(len(numbers))
    return seen
