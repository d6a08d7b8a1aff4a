"""`peft data`: what a file holds, and what would be learnt from it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_run.config import Recipe
    from peft_run.data.dataset import Dataset
    from peft_run.tasks.task import Task

HELP = {"en": "show what a data file holds and what would be learnt from it", "zh": "查看数据文件的内容及将学习的部分"}
ALIASES = ("preprocess", "inspect-data")
WIDTH = 30  # of the longest bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a data file, a folder, or a recipe")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the recipe")
    parser.add_argument("--model", help="count tokens and render samples with this model's tokenizer: model.path")
    parser.add_argument("--task", help="what to learn; default: what the file looks like")
    parser.add_argument("--samples", type=int, default=2, metavar="N", help="rendered samples to show (default: 2)")
    parser.set_defaults(free_options=True)


def main(args: argparse.Namespace) -> int:
    from peft_run.console import print_json
    from peft_run.data.dataset import load_dataset
    from peft_run.data.preview import segments
    from peft_run.data.stats import statistics

    recipe = recipe_of(args)
    dataset = load_dataset(recipe)
    task = task_of(recipe, dataset)
    items: dict[str, list[Any]] = {}
    if task is not None:
        items = {p: task.encode_all(s, args.console, training=False) for p, s in parts(dataset) if s}
    found = statistics(dataset, {part: [item.length for item in encoded] for part, encoded in items.items()})
    found["task"] = recipe.task
    if args.json:
        if task is not None:
            found["preview"] = [segments(item, task.tokenizer) for item in items["train"][: args.samples]]
        print_json(found)
    else:
        show(found, args)
    if task is not None:
        if not args.json:
            render(task, items["train"], args)
        task.check(items["train"])
    elif not args.json:
        args.console("stats.no_model")
    return 0


def parts(dataset: Dataset) -> list[tuple[str, list[Any]]]:
    return [("train", dataset.train), ("eval", dataset.eval)]


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe, or one for this file alone: whole, with nothing held out."""
    from peft_run.config import load

    overrides = [*args.overrides, *args.free]
    if args.model:
        overrides.append(f"model.path={args.model}")
    if args.file.endswith((".yaml", ".yml")):
        return load(args.file, [*overrides, *([f"task={args.task}"] if args.task else [])])
    base = [f"data.train={args.file}", "data.eval.split=0"]
    recipe = load(None, [*base, *overrides])
    task = args.task or guess(recipe)
    return load(None, [*base, f"task={task}", *overrides])


def guess(recipe: Recipe) -> str:
    """The task that data of this format is usually for."""
    from peft_run.data.detect import likely_task
    from peft_run.data.read import read

    source = recipe.data.train[0]
    return likely_task(read(recipe.at(source.path), encoding=source.encoding, sheet=source.sheet), source.map)


def task_of(recipe: Recipe, dataset: Dataset) -> Task | None:
    """Where the recipe names a model, what it would read."""
    if not recipe.model.path:
        return None
    from peft_run.train.stage import make_task

    return make_task(recipe, dataset.labels)


def show(found: dict[str, Any], args: argparse.Namespace) -> None:
    from peft_run.messages import sentence

    def line(key: str, **values: object) -> None:
        print(sentence(f"stats.{key}", args.lang, **values))

    line("task", task=found["task"])
    for file in found["files"]:
        mapping = ", ".join(f"{field} <- {column}" for field, column in file["mapping"].items())
        line(
            "file",
            **{**file, "mapping": mapping, "encoding": encoding(file["path"], args), "columns": len(file["columns"])},
        )
        if file["dropped"]:
            line("dropped", count=file["dropped"])
    line("samples", **found["samples"])
    for part, counts in found["labels"].items():
        line("labels", part=part)
        for label, count in list(counts.items())[:20]:
            bar(label, count, max(counts.values()))
    for unit in ("characters", "tokens"):
        for part, values in found[unit].items():
            spread = "  ".join(f"{name} {value}" for name, value in values["quantiles"].items())
            line(unit, part=part, spread=spread)
            top = max(count for *_, count in values["histogram"])
            for low, high, count in values["histogram"]:
                bar(f"{low}-{high}", count, top)
    line("duplicates", count=found["duplicates"])
    if found["samples"]["eval"]:
        line("leaked", count=found["leaked"])


def bar(name: str, count: int, top: int) -> None:
    print(f"  {name:>12}  {count:>7}  {'█' * max(bool(count), round(WIDTH * count / top))}")


def encoding(path: str, args: argparse.Namespace) -> str:
    from peft_run.data.read import READERS, decoded, read_parquet, read_xlsx

    folder = Path(args.file).parent if args.file.endswith((".yaml", ".yml")) else Path()
    file = folder / path
    if not file.is_file() or READERS.get(file.suffix.lower()) in (read_xlsx, read_parquet, None):
        return "-"
    return decoded(file)[1]


def render(task: Task, items: list[Any], args: argparse.Namespace) -> None:
    import sys

    from peft_run.data.preview import preview
    from peft_run.messages import sentence

    if args.samples:
        print(sentence("stats.preview", args.lang))
    for item in items[: args.samples]:
        print(preview(item, task.tokenizer, colour=sys.stdout.isatty()))
        print()
