"""Short commands of the road that a page waits for: `peft data`, `peft plan`, `peft doctor`, `peft inspect`."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from typing import Any, NamedTuple

from peft_run.ui.jobs import Jobs, command_words

PATIENCE = 180.0  # seconds


class Answer(NamedTuple):
    code: int
    result: Any  # of --json; None where there is none
    told: str  # stderr


def there_is(name: str) -> bool:
    """Whether this installation has the command."""
    return importlib.util.find_spec(f"peft_run.commands.{name}") is not None


def ask(jobs: Jobs, *words: str, language: str) -> Answer:
    """Run `peft WORDS --json` in the workspace and wait for it."""
    command = command_words(*words, "--json", language=language, options=jobs.options)
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    try:
        done = subprocess.run(
            command,
            cwd=jobs.workspace.root,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return Answer(1, None, f"> {PATIENCE:.0f} s")
    try:
        result = json.loads(done.stdout)
    except ValueError:
        result = None
    return Answer(done.returncode, result, done.stderr.strip())
