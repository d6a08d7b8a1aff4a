"""`peft recipes`: what there is to start from."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = {"en": "list, show and copy ready recipes", "zh": "列出、查看与复制现成的配方"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", nargs="?", choices=("ls", "show", "cp"), default="ls")
    parser.add_argument("name", nargs="?", metavar="RECIPE")
    parser.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="for cp; default: ./RECIPE")


def main(args: argparse.Namespace) -> int:
    from peft_run import recipes
    from peft_run.console import print_json

    if args.action == "ls":
        table = {name: recipes.about(name, args.lang) for name in recipes.names()}
        if args.json:
            print_json(table)
        else:
            width = max(map(len, table))
            print("\n".join(f"{name:{width}}  {about}" for name, about in table.items()))
        return 0
    name = args.name or ""
    if args.action == "show":
        folder = recipes.find(name)
        print(recipes.guide(name, args.lang))
        for file in sorted(folder.glob("*.yaml")):
            print(f"--- {file.name}\n{file.read_text(encoding='utf-8')}")
        return 0
    target = args.folder or Path(name)
    files = recipes.copy(name, target)
    args.console("recipes.copied", count=len(files), path=target)
    return 0
