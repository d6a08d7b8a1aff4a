"""`peft fetch`: real data for a recipe."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = {
    "en": "get real data for a recipe, with its licence and checksums",
    "zh": "获取配方的真实数据，附许可与校验和",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="a data set; without it they are listed")
    parser.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="a new folder; default: ./NAME-data")


def main(args: argparse.Namespace) -> int:
    from peft_run import corpora
    from peft_run.columns import columns
    from peft_run.console import print_json

    if args.name is None:
        found = {name: corpora.module(name) for name in corpora.NAMES}
        if args.json:
            print_json({name: {"source": m.SOURCE, "licence": m.LICENCE} for name, m in found.items()})
        else:
            print(columns([[name, m.ABOUT[args.lang], m.SOURCE, m.LICENCE] for name, m in found.items()]))
        return 0
    folder = args.folder or Path(f"{args.name}-data")
    origin = corpora.fetch(args.name, folder, args.console, offline=args.offline)
    args.console("corpora.next", train=folder / corpora.TRAIN, test=folder / corpora.TEST)
    if args.json:
        print_json(origin)
    return 0
