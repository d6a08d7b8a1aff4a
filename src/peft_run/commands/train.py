"""`peft train`."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = {"en": "fine-tune a model as a recipe says", "zh": "按配方微调模型"}
ALIASES = ("sft", "finetune", "ft")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from peft_run.options import add_recipe_arguments

    add_recipe_arguments(parser)
    parser.add_argument("-o", "--output-dir", metavar="DIR", help="folder of all runs: output.dir")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="RUN",
        help="go on with this run; without RUN: with the newest of this recipe that is not finished",
    )
    parser.add_argument("--force", action="store_true", help="train although the memory's plan says that it cannot fit")
    parser.add_argument("--dry-run", action="store_true", help="check the recipe and the data, and train nothing")


def main(args: argparse.Namespace) -> int:
    from peft_run.console import print_json
    from peft_run.run import Run

    run = run_to_resume(args)
    if run is None:
        from peft_run.options import recipe_of

        recipe = recipe_of(args)
        if args.dry_run:
            return dry_run(args, recipe)
        run = Run.create(recipe, given=Path(args.recipe) if args.recipe else None, command=command_line())
    from peft_run.train import train

    with args.console.copied_to(run / "run.log"):
        result = train(run, run.recipe, args.console, resume=args.resume is not None, force=args.force)
    if args.json:
        print_json({"run": str(run.path), **result})
    return 0


def run_to_resume(args: argparse.Namespace):  # -> Run | None
    """The run that --resume asks for."""
    from peft_run.errors import UsageError
    from peft_run.options import recipe_of, split_overrides
    from peft_run.run import Run, group_of

    if args.resume is None:
        if not args.recipe:
            raise UsageError("train.no_recipe")
        return None
    if args.resume != "auto":
        if args.recipe or split_overrides(args):
            changes = args.recipe or ", ".join(split_overrides(args))
            raise UsageError("train.recipe_changed", changes=changes)
        return unfinished(Run.open(args.resume))
    if not args.recipe:
        raise UsageError("train.no_recipe")
    recipe = recipe_of(args)
    group = group_of(recipe, Path(args.recipe))
    for path in sorted(group.glob("*/config.yaml"), reverse=True):
        run = Run(path.parent)
        if not path.parent.is_symlink() and run.read_json("status.json", {}).get("state") != "done":
            return run
    args.console("train.nothing_to_resume", path=group)
    args.resume = None
    return None


def unfinished(run):
    from peft_run.errors import UsageError

    if run.read_json("status.json", {}).get("state") == "done":
        raise UsageError("train.already_done", path=run.path)
    return run


def dry_run(args: argparse.Namespace, recipe) -> int:
    from peft_run.data.dataset import load_dataset
    from peft_run.train.stage import make_task, say_data

    dataset = load_dataset(recipe)
    say_data(dataset, args.console)
    task = make_task(recipe, dataset.labels)
    task.encode_all(dataset.train, args.console)
    task.encode_all(dataset.eval, args.console, training=False)
    return 0


def command_line() -> str:
    import shlex
    import sys

    return shlex.join(["peft", *sys.argv[1:]])
