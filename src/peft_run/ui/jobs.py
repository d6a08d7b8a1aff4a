"""Commands that outlive the page. All that is known of one is in its folder, so a page that starts anew finds it.

<workspace>/.jobs/<time>-<id>/
  asked.json   kind, words of the command, when, and what the page wants to remember of it
  began.json   pid of the command (written by keeper.py, which runs it)
  ended.json   exit code
  out.txt      stdout                    log.txt   stderr
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_run.errors import INTERRUPTED
from peft_run.files import read_json, write_json
from peft_run.run import STATUS, Run, fresh_name
from peft_run.ui.keeper import ASKED, BEGAN, ENDED, LOG, OUT
from peft_run.ui.workspace import JOBS, Workspace

TAIL = 20_000  # bytes of a log that a page shows
START_SECONDS = 20.0  # a keeper that has noted nothing by then never started
SAME_PROCESS = 5.0  # seconds between the start of a process and the note of it, at most
GONE = "gone"  # a run whose process ended without a word


class Job:
    """A command that was started. Nothing is kept in memory but what never changes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: dict[str, Any] = read_json(folder / ASKED)

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def kind(self) -> str:
        return self.asked["kind"]

    @property
    def more(self) -> dict[str, Any]:
        """What the page wanted to remember."""
        return self.asked["more"]

    @property
    def command(self) -> str:
        return shlex.join(["peft", *self.asked["peft"]])

    @property
    def pid(self) -> int | None:
        """The process of the command, while it runs."""
        began = self._noted(BEGAN)
        if not began or self.code is not None:
            return None
        return began["pid"] if is_running(began["pid"], began["began"]) else None

    @property
    def code(self) -> int | None:
        """The exit code; None while it runs, or where a power cut left none."""
        return self._noted(ENDED).get("code")

    @property
    def state(self) -> str:
        """starting, running, done, failed, interrupted, or lost: ended, and nobody saw how."""
        code = self.code
        if code is not None:
            return {0: "done", INTERRUPTED: "interrupted", -signal.SIGINT: "interrupted"}.get(code, "failed")
        began, asked = self._noted(BEGAN), self.asked["at"]
        if self.pid is not None or (began and is_running(began["keeper"], began["began"])):
            return "running"  # also while the keeper has yet to note the end of its command
        if not began and time.time() - asked < START_SECONDS:
            return "starting"
        return "lost" if self.code is None else self.state

    @property
    def is_on(self) -> bool:
        return self.state in ("starting", "running")

    def log(self) -> str:
        return tail(self.folder / LOG)

    def out(self) -> str:
        return tail(self.folder / OUT)

    def stop(self) -> None:
        """Ask it to stop, as Ctrl-C does: a training saves first."""
        pid = self.pid
        if pid is not None:
            interrupt(pid)

    def _noted(self, name: str) -> dict[str, Any]:
        try:
            return read_json(self.folder / name)
        except FileNotFoundError:
            return {}


class Jobs:
    """All jobs of a workspace."""

    def __init__(self, workspace: Workspace, options: Sequence[str] = ()) -> None:
        self.workspace = workspace
        self.options = list(options)  # that every command gets: --offline

    def start(
        self,
        kind: str,
        *words: str,
        language: str,
        environment: dict[str, str] | None = None,
        **more: Any,
    ) -> Job:
        """`start("train", "train", "recipes/a.yaml", language="en")` runs `peft train recipes/a.yaml`, detached."""
        folder = self.workspace.root / JOBS / fresh_name()
        folder.mkdir(mode=0o700)
        write_json(
            folder / ASKED,
            {
                "kind": kind,
                "peft": list(words),
                "words": command_words(*words, language=language, options=self.options),
                "cwd": str(self.workspace.root),
                "environment": {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", **(environment or {})},
                "at": time.time(),
                "more": more,
            },
        )
        subprocess.Popen(
            [sys.executable, "-m", "peft_run.ui.keeper", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return Job(folder)

    def all(self, *kinds: str) -> list[Job]:
        """Newest first. A folder that a crash left without its first file is no job."""
        found = [Job(path.parent) for path in (self.workspace.root / JOBS).glob(f"*/{ASKED}")]
        return sorted(
            (job for job in found if not kinds or job.kind in kinds), key=lambda job: job.asked["at"], reverse=True
        )

    def get(self, id: str) -> Job | None:
        return next((job for job in self.all() if job.id == id), None)


def command_words(*words: str, language: str, options: Sequence[str] = ()) -> list[str]:
    """`peft WORDS` for a process, by the interpreter that runs here."""
    return [sys.executable, "-m", "peft_run", *words, "--lang", language, *options]


def is_running(pid: int, began: float) -> bool:
    """Whether this process is still the one that was started then: numbers of processes are given anew."""
    import psutil

    try:
        process = psutil.Process(pid)
        return process.create_time() <= began + SAME_PROCESS and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def interrupt(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGINT)


def tail(path: Path) -> str:
    """The end of a text file, from a line's beginning."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            text = file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    return text if size <= TAIL else text.partition("\n")[2]


# -- runs, whoever started them ---------------------------------------------------------------------------------------


def state_of(run: Run) -> str:
    """As in status.json; `gone` where that says running and the process is not there any more."""
    status = run.read_json(STATUS, {})
    now = status.get("state", "new")
    if now == "running" and not is_running(status["pid"], status.get("started", 0)):
        return GONE
    return now


def stop_run(run: Run) -> None:
    """As Ctrl-C: a training saves a checkpoint first."""
    if state_of(run) == "running":
        interrupt(run.read_json(STATUS)["pid"])
