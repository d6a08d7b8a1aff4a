"""`peft export`."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = {
    "en": "write a run for transformers, llama.cpp, Ollama or vLLM",
    "zh": "导出为 transformers、llama.cpp、Ollama 或 vLLM 格式",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run, or the folder of an experiment (its latest run)")
    parser.add_argument("--to", required=True, choices=("hf", "gguf", "ollama", "vllm"), help="the program it is for")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--type", choices=("F16", "Q8_0"), default="F16", help="how a GGUF file stores weights")


def main(args: argparse.Namespace) -> int:
    from peft_run.console import print_json
    from peft_run.deploy.export import export
    from peft_run.run import Run

    report = export(Run.open(args.run), Path(args.output), args.to, args.console, kind=args.type)
    if args.json:
        print_json(report)
    return 0
