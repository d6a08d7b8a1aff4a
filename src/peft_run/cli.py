"""The command `peft`: find the sub-command, parse its options, turn what went wrong into one line and an exit code.

Every file in `peft_run/commands` is a command. It has

    HELP = {"en": ..., "zh": ...}      one line
    ALIASES = ("sft",)                 optional: other names, not listed
    def add_arguments(parser)
    def main(args) -> int | None       args has .console, .lang, .offline, .debug, .json and .quiet besides its own

and imports only the standard library at its top, so that `peft --help` is instant.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from peft_run import commands
from peft_run.console import Console
from peft_run.errors import INTERRUPTED, RunError
from peft_run.messages import LANGUAGES, default_language, sentence
from peft_run.options import divide

SWITCHES = ("--json", "--offline", "--quiet", "-q", "--debug")  # of all commands, which may also stand before its name


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong; `--help` shows the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def table() -> dict[str, ModuleType]:
    """name -> the module of the command; `_` in a file name is `-` in the name of the command."""
    names = sorted(module.name for module in pkgutil.iter_modules(commands.__path__))
    return {name.replace("_", "-"): importlib.import_module(f"peft_run.commands.{name}") for name in names}


def main(argv: Sequence[str] | None = None) -> int:
    # torch's threads wait for each other by turning in circles, which on a busy machine takes the time of the one that
    # all wait for: with two other programs on two cores, training took 37 s in place of 23. Read when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    known = table()
    argv = command_first(sys.argv[1:] if argv is None else argv)
    language = language_of(argv)
    parser = top_parser(known, language)
    chosen = parser.parse_args(argv)
    if chosen.version:
        import peft  # only now: it loads torch

        print(f"peft {peft.__version__}")
        return 0
    if chosen.command is None:
        parser.print_help()
        return 0
    name = find(chosen.command, known)
    if name is None:
        parser.error(unknown_command(chosen.command, known, language))
    return run_command(name, known[name], chosen.options, language)


def command_first(argv: Sequence[str]) -> list[str]:
    """`peft --json doctor` as `peft doctor --json`."""
    words, moved = list(argv), []
    place = 0
    while place < len(words) and (words[place] in SWITCHES or words[place].startswith("--lang")):
        if words[place] in SWITCHES:
            moved.append(words.pop(place))
        else:
            place += 2 if words[place] == "--lang" else 1
    return [*words[: place + 1], *moved, *words[place + 1 :]]


def language_of(argv: Sequence[str]) -> str:
    """The language is needed before the options are parsed: for help, and for what is wrong with them."""
    for option, value in zip(argv, [*argv[1:], ""]):
        asked = value if option == "--lang" else option.partition("--lang=")[2]
        if asked in LANGUAGES:
            return asked
    return default_language()


def top_parser(known: dict[str, ModuleType], language: str) -> argparse.ArgumentParser:
    width = max(map(len, known))
    parser = Parser(
        prog="peft",
        usage="peft COMMAND [options]",
        description=sentence("cli.about", language),
        epilog="\n".join(
            [sentence("cli.commands", language)]
            + [f"  {name:{width}}  {module.HELP[language]}" for name, module in known.items()]
            + ["", sentence("cli.more", language)]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="show the version of peft and exit")
    parser.add_argument("--lang", choices=LANGUAGES, help=sentence("cli.lang_help", language))
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("options", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def find(name: str, known: dict[str, ModuleType]) -> str | None:
    """The command called `name`, or that has it as an alias."""
    if name in known:
        return name
    return next((own for own, module in known.items() if name in getattr(module, "ALIASES", ())), None)


def unknown_command(name: str, known: dict[str, ModuleType], language: str) -> str:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if nearest:
        return sentence("cli.unknown_command", language, name=name, nearest=nearest[0])
    return sentence("cli.no_such_command", language, name=name, known=", ".join(known))


def run_command(name: str, command: ModuleType, options: Sequence[str], language: str) -> int:
    text = command.HELP[language]
    parser = Parser(prog=f"peft {name}", description=f"{text[:1].upper()}{text[1:]}", allow_abbrev=False)
    command.add_arguments(parser)
    add_common_arguments(parser, language)
    words, rest, free = list(options), [], []
    if parser.get_default("takes_rest") and "--" in words:
        words, rest = words[: words.index("--")], words[words.index("--") + 1 :]
    own = words
    if parser.get_default("free_options"):
        own, free = divide(words, parser)
    args, unknown = parser.parse_known_intermixed_args(own)
    if unknown:
        parser.error(unknown_option(unknown[0], name, parser, language))
    args.words, args.rest, args.free = words, rest, free
    args.lang = args.lang or language
    args.console = Console(args.lang, quiet=args.quiet)
    try:
        if args.offline:
            from peft_run.offline import go_offline

            go_offline()
        return command.main(args) or 0
    except KeyboardInterrupt:
        print(f"peft {name}: {sentence('cli.interrupted', args.lang)}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `peft ... | head`: nobody reads any more, which is no failure
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if args.debug:
            raise
        print(sentence("cli.error", args.lang, command=name, text=describe(error, args.lang)), file=sys.stderr)
        return exit_code(error)


def unknown_option(option: str, name: str, parser: argparse.ArgumentParser, language: str) -> str:
    near = difflib.get_close_matches(option, parser._option_string_actions, n=1)
    hint = sentence("cli.did_you_mean", language, name=near[0]) if near else ""
    return sentence("cli.unknown_option", language, option=option, nearest=hint, command=name)


def add_common_arguments(parser: argparse.ArgumentParser, language: str) -> None:
    """What every command has; one that wants another meaning of an option declares it first."""
    taken = parser._option_string_actions
    for option, settings in {
        "--lang": {"choices": LANGUAGES},
        "--offline": {"action": "store_true"},
        "--json": {"action": "store_true"},
        "--quiet": {"action": "store_true"},
        "--debug": {"action": "store_true"},
    }.items():
        if option not in taken:
            names = ("-q", option) if option == "--quiet" else (option,)
            parser.add_argument(*names, help=sentence(f"cli.{option[2:]}_help", language), **settings)


def describe(error: Exception, language: str) -> str:
    """An error in one line."""
    if isinstance(error, RunError):
        return error.tell(language)
    if isinstance(error, OSError) and error.filename is not None:
        return sentence("cli.os_error", language, path=error.filename, reason=error.strerror)
    text = " ".join(str(error).split())
    if type(error).__module__.startswith("peft."):  # the library's own errors say all there is to say
        return text
    return sentence("cli.unexpected", language, kind=type(error).__name__, error=text)


def exit_code(error: Exception) -> int:
    """RunErrors know theirs; a config that the library refuses is a wrong recipe."""
    names = {base.__name__ for base in type(error).__mro__}
    if names & {"ConfigError", "NoMatchingPeftModuleError"}:
        return 2
    return getattr(error, "exit_code", 1)
