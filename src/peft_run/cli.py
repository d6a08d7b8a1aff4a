"""The command `peft`: find the sub-command, parse its options, turn what went wrong into one line and an exit code."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from peft_run import demo, methods
from peft_run.errors import INTERRUPTED, RunError


class Command(NamedTuple):
    help: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


# The modules named here import torch and transformers inside their functions only, so that `peft --help` is instant.
COMMANDS = {
    "methods": Command("list the tuning methods and when to use them", methods.add_options, methods.run),
    "demo": Command("fine-tune a small real model on this machine and show what changed", demo.add_options, demo.run),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = top_parser()
    chosen = parser.parse_args(argv)
    if chosen.version:
        import peft  # only now: it loads torch

        print(f"peft {peft.__version__}")
        return 0
    if chosen.command is None:
        parser.print_help()
        return 0
    if chosen.command not in COMMANDS:
        parser.error(unknown_command(chosen.command))
    return run_command(chosen.command, chosen.options)


def top_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="peft",
        usage="peft COMMAND [options]",
        description="Parameter-efficient fine-tuning: adapt a large frozen model by training a small part of it.",
        epilog="\n".join(
            ["commands:"]
            + [f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items()]
            + ["", "peft COMMAND --help lists the options of a command."]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="show the version of peft and exit")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("options", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def unknown_command(name: str) -> str:
    nearest = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
    hint = f"Did you mean `{nearest[0]}`?" if nearest else f"There is: {', '.join(COMMANDS)}."
    return f"unknown command `{name}`. {hint}"


def run_command(name: str, options: Sequence[str]) -> int:
    command = COMMANDS[name]
    parser = argparse.ArgumentParser(prog=f"peft {name}", description=command.help[:1].upper() + command.help[1:] + ".")
    command.add_options(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(options)
    try:
        return command.run(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if arguments.debug:
            raise
        expected = isinstance(error, RunError)
        text = str(error) if expected else f"{type(error).__name__}: {error} (`--debug` shows where)"
        print(f"peft {name}: error: {text}", file=sys.stderr)
        return error.exit_code if expected else RunError.exit_code
