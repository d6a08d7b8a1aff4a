"""`peft compare`."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = {
    "en": "put runs side by side: measures, curves, recipes, answers",
    "zh": "并排对比多个运行：指标、曲线、配方、回答",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="runs; the first is what the others are held against")
    parser.add_argument("-o", "--output", type=Path, default=Path("compare.html"), help="default: compare.html")


def main(args: argparse.Namespace) -> int:
    from peft_run.columns import columns
    from peft_run.compare import compare, page
    from peft_run.console import print_json
    from peft_run.errors import UsageError
    from peft_run.run import Run

    runs = [Run.open(path) for path in args.runs]
    if len({run.path for run in runs}) < 2:
        raise UsageError("compare.two")
    result = compare(runs)
    page.write(result, runs, args.output, args.lang)
    if args.json:
        print_json(result)
        return 0
    for header, rows in (page.table(result, args.lang), page.facts_table(result, args.lang)):
        if rows:
            print(columns([header, *rows]) + "\n")
    for name in result["not_evaluated"]:
        args.console("compare.not_evaluated", run=name)
    args.console("compare.written", path=args.output)
    return 0
