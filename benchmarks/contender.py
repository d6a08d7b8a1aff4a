"""The orchestrator's end of a worker process."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

WORKER = Path(__file__).with_name("worker.py")


class ContenderError(RuntimeError):
    """The worker answered with a traceback, or died."""


@dataclass
class Contender:
    name: str
    python: str
    source: str  # put on PYTHONPATH; empty for an installed package
    options: tuple[str, ...]  # of worker.py
    threads: int
    log: Path  # what the worker and the libraries in it print

    def __post_init__(self) -> None:
        self.process = self.start()

    def start(self) -> subprocess.Popen:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONHASHSEED": "0"}
        environment |= {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        if self.source:
            environment["PYTHONPATH"] = self.source
        with self.log.open("a") as log:
            return subprocess.Popen(
                [self.python, "-W", "ignore", str(WORKER), *self.options],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )

    def ask(self, do: str, **arguments) -> dict:
        if self.process.poll() is not None:
            self.process = self.start()
        return self.exchange(self.process, {"do": do, **arguments})

    def measure_in_fresh_process(self, case: str, arguments: dict, part: str) -> float:
        process = self.start()
        try:
            self.exchange(process, {"do": "prepare", "case": case, "arguments": arguments})
            return self.exchange(process, {"do": "measure", "part": part})["value"]
        finally:
            self.end(process)

    def exchange(self, process: subprocess.Popen, request: dict) -> dict:
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code, last_words = process.wait(), self.log.read_text()[-2000:]
            raise ContenderError(f"{self.name}: the worker ended with code {code} at {request}\n{last_words}")
        answer = json.loads(line)
        if "error" in answer:
            raise ContenderError(f"{self.name}: {request}\n{answer['error']}")
        return answer

    def stop(self) -> None:
        self.end(self.process)

    @staticmethod
    def end(process: subprocess.Popen) -> None:
        process.stdin.close()
        process.wait()
        process.stdout.close()
