"""`peft merge`."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = {"en": "put a run's adapter into its base, and prove it", "zh": "把适配器合并进基座，并验证结果"}
ALIASES = ("fuse",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run, or the folder of an experiment (its latest run)")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="the new folder of the merged model")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="number format; that of the run if not given")
    parser.add_argument(
        "--onto",
        choices=("trained", "original"),
        default="trained",
        help="of a run on a quantized base: into the weights it was trained on, or those before quantization",
    )


def main(args: argparse.Namespace) -> int:
    from peft_run.console import print_json
    from peft_run.deploy.merge import merge
    from peft_run.run import Run

    report = merge(Run.open(args.run), Path(args.output), args.console, dtype=args.dtype, onto=args.onto)
    if args.json:
        print_json(report)
    return 0
