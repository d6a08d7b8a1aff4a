"""The largest batches of a recipe as shapes: from its data, or, where there is none, from its settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from peft_run.tasks.task import WIDTH, Batch

if TYPE_CHECKING:
    from peft_run.config import Recipe
    from peft_run.tasks.task import Task

ENCODED = 128  # samples, the longest in characters, among which the longest in tokens is looked for


@dataclass
class Batches:
    """`make(batch, length)` gives the task's batch on the meta device; `task` is None where only its class is known.

    length: of the longest item; mean: of all; samples: how many there are to train on, None without data.
    """

    make: Callable[[int, int], Batch] | None
    task: Task | None
    length: int
    mean: float | None = None
    samples: int | None = None
    evaluated: bool = False


def of_items(recipe: Recipe, task: Task, items: Sequence[Any], held_out: Sequence[Any]) -> Batches:
    """From encoded samples: the longest ones make the batch that memory is needed for."""
    longest = sorted([*items, *held_out], key=lambda item: item.length)[-recipe.train.batch :]
    longest += [longest[-1]] * (recipe.train.batch - len(longest))
    collated = task.collate(longest)
    width = -(-longest[-1].length // WIDTH) * WIDTH
    mean = sum(item.length for item in items) / max(1, len(items))
    make = maker(collated, recipe.train.batch, width)
    return Batches(make, task, width, mean, len(items), bool(held_out))


def of_recipe(recipe: Recipe) -> Batches:
    """From the recipe's data; without data, of its max_length."""
    if recipe.data.train:
        from peft_run.console import silent
        from peft_run.data.dataset import load_dataset
        from peft_run.train.stage import make_task

        dataset = load_dataset(recipe)
        task = make_task(recipe, dataset.labels)
        few = [task.encode_all(longest(part), silent(), training=False) for part in (dataset.train, dataset.eval)]
        found = of_items(recipe, task, *few)
        found.samples = len(dataset.train)
        return found
    if recipe.task != "causal_lm":
        return Batches(None, None, recipe.data.max_length)
    import torch

    from peft_run import tasks

    renderer = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0), specials=set())
    numbers = torch.zeros(WIDTH, dtype=torch.long)
    batch = {"input_ids": numbers[None], "at": numbers[1:], "targets": numbers[1:], "units": 1, "tokens": 1}
    make = maker(batch, 1, WIDTH)
    return Batches(make, tasks.make(recipe, renderer, []), recipe.data.max_length)  # type: ignore[arg-type]


def longest(samples: Sequence[Any]) -> list[Any]:
    return sorted(samples, key=lambda sample: len(str(sample)))[-ENCODED:]


def maker(batch: Batch, rows: int, width: int) -> Callable[[int, int], Batch]:
    """Batches like this one, of another number of samples and another length."""
    import torch

    def resized(value: Any, more: float, longer: float) -> Any:
        if isinstance(value, dict):
            return {name: resized(inner, more, longer) for name, inner in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        shape = list(value.shape)
        if len(shape) > 1:  # (rows, width, ...), or, packed, (1, all tokens)
            packed = shape[0] == 1 and shape[1] > width
            shape[:2] = [1, round(shape[1] * more * longer)] if packed else [shape[0] * more, round(shape[1] * longer)]
        elif shape and shape[0] % rows == 0 and shape[0] < width:  # one for each row
            shape[0] = shape[0] * more
        elif shape:  # one for each learnt token
            shape[0] = shape[0] * more * longer
        return torch.empty([max(1, round(n)) for n in shape], dtype=value.dtype, device="meta")

    return lambda count, length: resized(batch, count / rows, length / width)
