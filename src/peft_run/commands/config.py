"""`peft config`: what a recipe may say, and what one says."""

from __future__ import annotations

import argparse
import difflib

HELP = {"en": "explain, check and show recipes", "zh": "解释、检查与显示配方"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("schema", "explain", "validate", "show"))
    parser.add_argument("what", nargs="*", metavar="KEY | FILE [section.key=value ...]")


def main(args: argparse.Namespace) -> int:
    return {"schema": schema, "explain": explain, "validate": validate, "show": show}[args.action](args)


def schema(args: argparse.Namespace) -> int:
    """JSON Schema, for editors and forms."""
    from peft_run.config.describe import json_schema
    from peft_run.console import print_json

    print_json(json_schema(args.lang))
    return 0


def explain(args: argparse.Namespace) -> int:
    from peft_run.config.describe import describe, names
    from peft_run.console import print_json
    from peft_run.errors import UsageError
    from peft_run.messages import sentence

    known = names()
    wanted = args.what or known
    rows = []
    for name in wanted:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1) or [n for n in known if n.endswith(f".{name}")]
            hint = sentence("cli.did_you_mean", args.lang, name=f"`{close[0]}`") if close else ""
            raise UsageError("config.unknown_key", key=name, hint=hint)
        rows += [describe(n, args.lang) for n in known if n == name or (args.what and n.startswith(f"{name}."))]
    if args.json:
        print_json(rows)
        return 0
    words = {key: sentence(f"config.{key}", args.lang) for key in ("type", "default", "also")}
    for row in rows:
        print(row["name"])
        print(f"    {row['help']}")
        print("    " + "  ".join(f"{words[key]}: {row[key]}" for key in ("type", "default", "also") if row[key]))
    return 0


def validate(args: argparse.Namespace) -> int:
    from peft_run.config import load

    for file in args.what:
        load(file)
        args.console("config.valid", file=file)
    return 0


def show(args: argparse.Namespace) -> int:
    from peft_run.config import dump, load
    from peft_run.console import print_json

    recipe = load(args.what[0] if args.what else None, args.what[1:])
    if args.json:
        print_json(recipe.model_dump(mode="json"))
    else:
        print(dump(recipe), end="")
    return 0
