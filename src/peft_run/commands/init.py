"""`peft init`: a folder to start in."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = {"en": "start a project from a ready recipe", "zh": "用现成的配方开始一个项目"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="RECIPE", help="one of `peft recipes`; without it they are listed")
    parser.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="default: ./RECIPE")


def main(args: argparse.Namespace) -> int:
    from peft_run import recipes

    if args.name is None:
        from peft_run.commands.recipes import main as list_them

        args.action = "ls"
        return list_them(args)
    target = args.folder or Path(args.name)
    files = recipes.copy(args.name, target)
    args.console("recipes.copied", count=len(files), path=target)
    args.console("recipes.next", path=target)
    return 0
