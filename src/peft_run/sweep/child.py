"""The worker process as the sweep sees it: begun, asked, told to stop, and begun anew where it has died."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft_run
from peft_run.messages import sentence
from peft_run.sweep.folder import FAILED, WORKER_LOG, Folder

INTERRUPTED = "interrupted"
TICK = 0.2  # seconds between two looks at whether somebody wants to stop


class Child:
    """The child process; begun anew where it has died. `with` ends it."""

    def __init__(self, folder: Folder, language: str, offline: bool) -> None:
        self.folder = folder
        self.command = [sys.executable, "-m", "peft_run.sweep.worker", str(folder.path), language]
        self.command += ["--offline"] if offline else []
        self.language = language
        self.process: subprocess.Popen[str] | None = None
        self.inbox: queue.Queue[str | None] = queue.Queue()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()

    def begin(self) -> subprocess.Popen[str]:
        """In a session of its own: Ctrl-C in the terminal reaches the sweep alone, which passes it on once."""
        source = str(Path(peft_run.__file__).parents[1])
        path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
        with open(self.folder / WORKER_LOG, "ab") as log:
            process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": path},
            )
        self.inbox = inbox = queue.Queue()

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                inbox.put(line)
            inbox.put(None)

        threading.Thread(target=read, daemon=True).start()
        return process

    def ask(
        self, job: dict[str, Any], evaluated: Callable[[dict[str, Any]], bool], interrupted: Callable[[], bool]
    ) -> dict[str, Any]:
        """Have a job done. A worker that dies of it is an answer too: `failed`, with the reason."""
        if self.process is None or self.process.poll() is not None:
            self.process = self.begin()
        self.send(job)
        told = False
        while True:
            if interrupted() and not told:
                self.process.send_signal(signal.SIGINT)
                told = True
            try:
                line = self.inbox.get(timeout=TICK)
            except queue.Empty:
                continue
            if line is None:
                self.process.wait()
                return {"ended": INTERRUPTED} if told else {"ended": FAILED, "reason": self.death()}
            message = json.loads(line)
            if "ended" in message:
                return message
            self.send({"go": evaluated(message["evaluated"])})

    def send(self, message: dict[str, Any]) -> None:
        assert self.process is not None and self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has just died: `ask` hears so
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()

    def death(self) -> str:
        """Why the process has ended, in a sentence."""
        assert self.process is not None
        code = self.process.returncode
        if code == -signal.SIGKILL:
            return sentence("sweep.killed", self.language)
        if code < 0:
            return sentence("sweep.signal", self.language, name=signal.Signals(-code).name)
        lines = (self.folder / WORKER_LOG).read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return sentence("sweep.died", self.language, code=code, last=last)

    def end(self) -> None:
        """It ends when its stdin does."""
        if self.process is None or self.process.stdin is None:
            return
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process = None
