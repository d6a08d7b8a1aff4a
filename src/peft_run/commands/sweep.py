"""`peft sweep`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft_run.sweep.folder import Folder

HELP = {
    "en": "search over hyperparameters: many runs of one recipe, and which of them was best",
    "zh": "搜索超参数：同一配方的多次运行，以及哪一次最好",
}
ALIASES = ("search", "tune")
SHOW, BEST = "show", "best"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "peft sweep RECIPE.yaml [SWEEP.yaml] [--axis FIELD=VALUES ...] [section.key=value ...]\n"
        "       peft sweep --resume DIR\n"
        "       peft sweep show DIR\n"
        "       peft sweep best DIR [-o RECIPE.yaml]"
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="the recipe to vary; or `show`, or `best`")
    parser.add_argument("overrides", nargs="*", metavar="...", help="a sweep's file, and changes to the recipe")
    parser.add_argument(
        "--axis",
        action="append",
        default=[],
        metavar="FIELD=VALUES",
        help="adapter.r=4,8,16 or 'train.lr={low: 1e-4, high: 1e-2, log: true}'; may be repeated",
    )
    parser.add_argument("--search", choices=("grid", "random", "tpe"), help="default: grid; tpe needs Optuna")
    parser.add_argument("--trials", type=int, metavar="N", help="how many; a grid needs none")
    parser.add_argument("--objective", metavar="MEASURE", help="what is best: loss (held-out; default), accuracy, ...")
    parser.add_argument("--prune", choices=("none", "median"), help="with tpe: stop trials worse than the median")
    parser.add_argument("--storage", metavar="URL", help="with tpe: a database that several machines share")
    parser.add_argument("--seed", type=int, metavar="N", help="of the search, not of the training")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on with this sweep")
    parser.add_argument("-o", "--output", metavar="PATH", help="folder of all runs; for `best`, the recipe to write")
    parser.set_defaults(free_options=True)  # cli: what is no option of the command changes the recipe


def main(args: argparse.Namespace) -> int:
    if args.resume is not None:
        return go_on(args)
    if args.recipe in (SHOW, BEST):
        return look(args)
    from peft_run.commands.train import command_line
    from peft_run.errors import UsageError
    from peft_run.options import recipe_of
    from peft_run.sweep import start
    from peft_run.sweep.settings import load_settings

    files = [word for word in args.overrides if word.endswith((".yaml", ".yml")) and "=" not in word]
    args.overrides = [word for word in args.overrides if word not in files]
    args.output_dir, args.config = args.output, None
    if not args.recipe or len(files) > 1:
        raise UsageError("sweep.no_recipe")
    recipe = recipe_of(args)
    settings = load_settings(Path(files[0]) if files else None, args.axis, **changes(args))
    folder = start(
        settings, recipe, args.console, given=Path(args.recipe), command=command_line(), offline=args.offline
    )
    show(folder, args)
    return 0


def changes(args: argparse.Namespace) -> dict[str, object]:
    return {name: getattr(args, name) for name in ("search", "trials", "objective", "prune", "storage", "seed")}


def go_on(args: argparse.Namespace) -> int:
    from peft_run.errors import UsageError
    from peft_run.sweep import resume

    words = [args.recipe, *args.overrides, *args.axis, *args.free]
    words += [f"--{name}" for name, value in changes(args).items() if value is not None]
    if given := ", ".join(word for word in words if word):
        raise UsageError("sweep.fixed_on_resume", changes=given)
    show(resume(args.resume, args.console, offline=args.offline), args)
    return 0


def look(args: argparse.Namespace) -> int:
    """`show` and `best`: what a sweep has found so far."""
    from peft_run.errors import UsageError
    from peft_run.sweep.folder import Folder

    if len(args.overrides) != 1 or args.free:
        raise UsageError("sweep.which", action=args.recipe)
    folder = Folder.open(args.overrides[0])
    if args.recipe == SHOW:
        show(folder, args)
        return 0
    return best(folder, args)


def show(folder: Folder, args: argparse.Namespace) -> None:
    """The ranking on stdout; the pages anew, in the reader's language."""
    from peft_run.columns import columns
    from peft_run.console import print_json
    from peft_run.sweep import report

    found = report.write(folder, args.lang)
    if args.json:
        print_json({"sweep": str(folder.path), **found})
    elif found["ranking"]:
        header, rows = report.ranking_table(found, args.lang)
        print(columns([header, *rows]))
    args.console("sweep.report", path=folder / report.PAGE)


def best(folder: Folder, args: argparse.Namespace) -> int:
    """The best trial's recipe, as somebody would have written it."""
    from peft_run.config import dump
    from peft_run.console import print_json
    from peft_run.errors import UsageError
    from peft_run.files import check_parent, write_text
    from peft_run.sweep.results import ranking

    ranked = ranking(list(folder.trials().values()), folder.settings)
    if not ranked:
        raise UsageError("sweep.no_best", path=folder.path)
    recipe = folder.recipe_of(ranked[0]["values"])
    path = Path(args.output) if args.output else None
    if path is not None:
        check_parent(path)
        if path.exists():
            raise UsageError("sweep.there_already", path=path)
        write_text(path, dump(recipe, path.parent.resolve()))
        args.console("sweep.wrote_best", number=ranked[0]["trial"], path=path)
    if args.json:
        print_json({"recipe": None if path is None else str(path), **ranked[0]})
    elif path is None:
        print(dump(recipe, Path.cwd()), end="")
    return 0
