"""A recipe on the command line: `peft COMMAND recipe.yaml section.key=value --any-key value`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft_run.config import Recipe


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a recipe file; `peft init` writes one")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="what to change; also as --section.key value, and with familiar names such as --lora-rank 8",
    )
    parser.add_argument("-c", "--config", dest="config", metavar="RECIPE", help=argparse.SUPPRESS)
    parser.set_defaults(free_options=True)  # cli: what is no option of the command changes the recipe


def split_overrides(args: argparse.Namespace) -> list[str]:
    """All changes to the recipe, in the order given; settles which argument is the recipe."""
    overrides = list(args.overrides)
    if args.config is not None:
        if args.recipe is not None:
            overrides.insert(0, args.recipe)
        args.recipe, args.config = args.config, None
    elif args.recipe is not None and "=" in args.recipe and not args.recipe.endswith((".yaml", ".yml", ".json")):
        overrides.insert(0, args.recipe)
        args.recipe = None
    args.overrides = overrides
    found = [*overrides, *args.free]
    if getattr(args, "output_dir", None):
        import os

        found.append(f"output.dir={os.path.abspath(args.output_dir)}")
    return found


def recipe_of(args: argparse.Namespace) -> Recipe:
    from peft_run.config import load

    overrides = split_overrides(args)
    return load(args.recipe, overrides)


def free_options(words: list[str]) -> list[str]:
    """`--lora-rank 8` and `--train.lr=1e-4` as overrides; a lone `--packing` is true."""
    found: list[str] = []
    for word in words:
        if word.startswith("--"):
            found.append(word[2:] if "=" in word else f"{word[2:]}=true")
        elif found and found[-1].endswith("=true") and "=" in found[-1]:
            found[-1] = f"{found[-1].removesuffix('true')}{word}"
        else:
            found.append(word)
    return found
