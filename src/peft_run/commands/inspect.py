"""`peft inspect`."""

from __future__ import annotations

import argparse

HELP = {"en": "what an adapter is, what it changes and how much", "zh": "查看适配器：类型、改动位置与大小"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="RUN|FOLDER", help="a run, or any folder with an adapter")


def main(args: argparse.Namespace) -> int:
    from peft_run.adapter_report import report
    from peft_run.console import print_json

    found = report(args.adapter)
    if args.json:
        print_json(found)
        return 0
    for name, value in found.items():
        if name != "modules":
            print(f"{name:<12}{value}")
    for row in found["modules"]:
        print(f"  {row['module']:<56}{row['numbers']:>10,}  |{row['norm']:.4f}|")
    return 0
