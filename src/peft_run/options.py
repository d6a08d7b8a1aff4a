"""A recipe on the command line: `peft COMMAND recipe.yaml section.key=value --any-key value`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft_run.config import Recipe

RECIPES = (".yaml", ".yml", ".json")  # how the name of a recipe file ends


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
    elif args.recipe is not None and "=" in args.recipe and not args.recipe.endswith(RECIPES):
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


def divide(words: Sequence[str], parser: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """(words for the command's own parser, changes to the recipe from options that it does not have).

    Both may stand anywhere: `--lora-rank 8 recipe.yaml`, `recipe.yaml --train.lr=1e-4`, and a lone `--packing`.
    """
    own = parser._option_string_actions
    mine: list[str] = []
    free: list[str] = []
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        name, equals, _ = word.partition("=")
        if name in own or not word.startswith("--"):
            mine.append(word)
            if name in own and not equals and own[name].nargs is None and waiting:
                mine.append(waiting.pop(0))
        elif equals:
            free.append(word[2:])
        elif waiting and is_value(name[2:], waiting[0]):
            free.append(f"{name[2:]}={waiting.pop(0)}")
        else:
            free.append(f"{name[2:]}=true")
    return mine, free


def is_value(name: str, word: str) -> bool:
    """Whether `word` belongs to the option before it. Switches take none but true and false."""
    if word.startswith("--") or re.match(r"[\w.]+=", word):
        return False
    from peft_run.config.load import canonical, fields

    keys, _ = canonical(name.replace("-", "_").split("."), word)
    kinds = {path: field.annotation for path, field in fields()}
    return kinds.get(".".join(keys)) is not bool or word.lower() in ("true", "false", "yes", "no", "on", "off")
