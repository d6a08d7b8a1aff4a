"""`peft predict`."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = {"en": "answer the rows of a file with a tuned model", "zh": "用微调后的模型回答文件中的每一行"}
ALIASES = ("infer",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN [section.key=value ...]", help="a run's folder; what to change")
    parser.add_argument("-i", "--input", required=True, type=Path, metavar="FILE", help="rows to answer")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help=".jsonl or .csv; default: lines on stdout")
    parser.add_argument(
        "--map", action="append", default=[], metavar="FIELD=COLUMN", help="which column is which field; repeatable"
    )
    parser.set_defaults(free_options=True)  # eval.* and where the model is may be changed


def main(args: argparse.Namespace) -> int:
    from peft_run.console import print_json
    from peft_run.errors import UsageError
    from peft_run.evaluate.changes import recipe_with, split
    from peft_run.predict import predict

    for text in args.map:
        if not all(text.partition("=")):
            raise UsageError("predict.bad_map", given=text)
    paths, overrides = split(args)
    if len(paths) != 1:
        raise UsageError("evaluate.one_run")
    run, recipe = recipe_with(paths[0], overrides)
    mapping = dict(text.split("=", 1) for text in args.map)
    result = predict(run, args.input, args.output, recipe, args.console, mapping=mapping)
    if args.json and args.output is not None:
        print_json(result)
    return 0
