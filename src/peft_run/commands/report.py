"""`peft report`: the page of a run."""

from __future__ import annotations

import argparse

HELP = {"en": "draw the plots of a run and write its report.html", "zh": "绘制一次运行的曲线并生成 report.html"}
ALIASES = ("plot",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN")


def main(args: argparse.Namespace) -> int:
    from peft_run.report import write_report
    from peft_run.run import Run

    path = write_report(Run.open(args.run), args.lang)
    args.console("report.written", path=path)
    return 0
