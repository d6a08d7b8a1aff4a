"""What a stage may say to the person who waits for it: sentences, warnings, and the progress of steps."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from peft_run.messages import Say, default_language


class Console(Say):
    """`console("train.saved", folder=...)` says a sentence in the user's language.

    Text goes to stderr, because stdout belongs to results. `quiet` leaves warnings.
    """

    def __init__(self, language: str | None = None, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        super().__init__(language or default_language(), self.write)
        self.quiet = quiet
        self.stream = stream or sys.stderr
        self.warnings: list[str] = []
        self.copy: TextIO | None = None

    @property
    def is_terminal(self) -> bool:
        return self.stream.isatty()

    def write(self, text: str = "") -> None:
        if not self.quiet:
            print(text, file=self.stream, flush=True)
        self.note(text)

    def note(self, text: str) -> None:
        """Into the log file only."""
        if self.copy is not None:
            print(text, file=self.copy, flush=True)

    @contextmanager
    def copied_to(self, path: Path) -> Iterator[None]:
        """All that is said meanwhile goes to a file, too."""
        with open(path, "a", encoding="utf-8") as self.copy:
            try:
                yield
            finally:
                self.copy = None

    def warn(self, key: str, /, **values: object) -> None:
        """Something that the user should know, also with --quiet. It is kept for the report."""
        text = self.text(key, **values)
        if text not in self.warnings:
            self.warnings.append(text)
            print(f"  ! {text}", file=self.stream, flush=True)
            self.note(f"  ! {text}")


def silent() -> Console:
    """For use in programs and notebooks: nothing but warnings."""
    return Console(quiet=True)


def print_json(result: Any) -> None:
    """The result of a command on stdout."""
    import json

    print(json.dumps(result, ensure_ascii=False, indent=2))
