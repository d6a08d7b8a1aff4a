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
        help="go on with this run; with a recipe, or without RUN: with the newest of the recipe that is not finished",
    )
    parser.add_argument("--force", action="store_true", help="train although the memory's plan says that it cannot fit")
    parser.add_argument("--dry-run", action="store_true", help="check the recipe and the data, and train nothing")
    parser.add_argument(
        "--launcher",
        choices=("torchrun", "accelerate"),
        help="train in several processes (NPROC_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT say which); "
        "arguments after `--` are the launcher's",
    )
    parser.set_defaults(takes_rest=True)  # cli: what follows `--` is in args.rest


def main(args: argparse.Namespace) -> int:
    from peft_run.errors import UsageError

    if args.launcher:
        return launch(args)
    if args.rest:
        raise UsageError("world.arguments")
    settle(args)
    if args.dry_run:
        from peft_run.options import recipe_of

        return dry_run(args, recipe_of(args))
    from peft_run.train.launch import note_exit_code

    code = 1
    try:
        code = work(args)
    except KeyboardInterrupt:
        code = 130
        raise
    except Exception as error:
        from peft_run.cli import exit_code

        code = exit_code(error)
        raise
    finally:
        note_exit_code(code)
    return code


def work(args: argparse.Namespace) -> int:
    from peft_run.console import print_json, silent
    from peft_run.run import Follower
    from peft_run.train import train
    from peft_run.train.world import join

    recipe = recipe_or_none(args)
    world = join(recipe) if recipe is not None else join(open_run(args).recipe)
    # The first process finds or makes the run; the others read its recipe and write nothing.
    run = world.share(find_or_create(args, recipe) if world.main else None)
    how = {"resume": args.resume is not None, "force": args.force}
    if world.main:
        with args.console.copied_to(run / "run.log"):
            result = train(run, run.recipe, args.console, world=world, **how)
    else:
        follower = Follower(run.path)
        result = train(follower, follower.recipe, silent(), world=world, **how)
    if args.json and world.main:
        print_json({"run": str(run.path), **result})
    world.end()
    return 0


# -- which run --------------------------------------------------------------------------------------------------------


def settle(args: argparse.Namespace) -> None:
    """`--resume recipe.yaml` is `--resume` of that recipe."""
    from peft_run.options import RECIPES

    asked = args.resume
    if asked not in (None, "auto") and asked.endswith(RECIPES) and not Path(asked).with_name("status.json").exists():
        args.overrides = [*([args.recipe] if args.recipe else []), *args.overrides]
        args.recipe, args.resume = asked, "auto"
    elif asked not in (None, "auto") and Path(asked).name == "config.yaml":
        args.resume = str(Path(asked).parent)


def recipe_or_none(args: argparse.Namespace):  # -> Recipe | None
    """The recipe, except where a run is named, which has its own."""
    from peft_run.errors import UsageError
    from peft_run.options import recipe_of, split_overrides

    if args.resume not in (None, "auto"):
        if args.recipe or split_overrides(args):
            changes = args.recipe or ", ".join(split_overrides(args))
            raise UsageError("train.recipe_changed", changes=changes)
        return None
    if not args.recipe:
        raise UsageError("train.no_recipe")
    return recipe_of(args)


def open_run(args: argparse.Namespace):  # -> Run
    from peft_run.errors import UsageError
    from peft_run.run import Run

    run = Run.open(args.resume)
    if run.trained:
        raise UsageError("train.already_done", path=run.path)
    return run


def find_or_create(args: argparse.Namespace, recipe):  # -> Run
    """The run to work on: the one to resume, else a new one."""
    from peft_run.run import Run

    if recipe is None:
        return open_run(args)
    if args.resume is not None:
        run = newest_unfinished(args, recipe)
        if run is not None:
            return run
    return Run.create(recipe, given=Path(args.recipe), command=command_line())


def newest_unfinished(args: argparse.Namespace, recipe):  # -> Run | None
    """The newest run of this recipe, if its training has not ended. UsageError where the recipe has been changed."""
    from peft_run.config import dump, load
    from peft_run.errors import UsageError
    from peft_run.run import CONFIG, Run, group_of

    group = group_of(recipe, Path(args.recipe))
    asked = recipe.model_copy(deep=True)
    asked._base, asked.output.name = recipe.base, group.name
    for path in sorted(group.glob(f"*/{CONFIG}"), reverse=True):
        run = Run(path.parent)
        if path.parent.is_symlink() or run.trained:
            continue
        if dump(asked, run.path) != dump(load(run / CONFIG), run.path):
            raise UsageError(
                "train.recipe_differs", path=run.path, fields=differing(asked, load(run / CONFIG), run.path)
            )
        return run
    args.console("train.nothing_to_resume", path=group)
    return None


def differing(asked, found, folder: Path) -> str:
    """The fields in which two recipes differ."""
    import yaml

    from peft_run.compare.collect import flattened
    from peft_run.config import dump

    ours, theirs = (flattened(yaml.safe_load(dump(recipe, folder))) for recipe in (asked, found))
    return ", ".join(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


# -- other ways -------------------------------------------------------------------------------------------------------


def launch(args: argparse.Namespace) -> int:
    """In several processes. What is wrong with the recipe is said here, once, before they start."""
    from peft_run.train import launch as launching

    settle(args)
    recipe = recipe_or_none(args)
    if recipe is None:
        open_run(args)
    elif args.dry_run:
        return dry_run(args, recipe)
    return launching.launch(args.launcher, launching.without_launcher(args.words), args.rest)


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
