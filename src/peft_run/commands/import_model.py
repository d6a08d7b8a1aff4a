"""`peft import-model`."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = {"en": "make a trainable model of a GGUF file", "zh": "把 GGUF 文件转换成可训练的模型"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE.gguf", help="a Llama model")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="bf16", help="number format (bf16)")


def main(args: argparse.Namespace) -> int:
    from peft_run.base import DTYPES, dtype_named
    from peft_run.console import print_json
    from peft_run.deploy.merge import check_free
    from peft_run.errors import UsageError
    from peft_run.files import new_folder
    from peft_run.gguf_llama import GgufLlama

    file, out = Path(args.file), Path(args.output)
    if not file.is_file():
        raise UsageError("deploy.import_no_file", path=file)
    check_free(out)
    try:
        read = GgufLlama(file)
    except ValueError as error:  # no GGUF file at all
        raise UsageError("deploy.import_broken", path=file, problem=error) from error
    model, tokenizer = read.model(dtype_named(DTYPES[args.dtype])), read.tokenizer()
    with new_folder(out) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
    args.console("deploy.import_done", path=out, parameters=model.num_parameters())
    if args.json:
        print_json({"path": str(out), "parameters": model.num_parameters()})
    return 0
