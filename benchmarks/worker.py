"""One contender's process: reads requests as JSON lines on stdin, answers on stdout. Started by run.py.

It runs in either environment, and what `import peft` finds there is the contender.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--cores", required=True, help="comma-separated core numbers to stay on")
    parser.add_argument("--scratch", required=True, help="folder with the adapters that both contenders load")
    parser.add_argument("--clock", choices=["wall", "cpu"], required=True)
    options = parser.parse_args()

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not get between the answers
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(core) for core in options.cores.split(",")})
    worker = Worker(options.scratch, options.threads, options.clock)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


class Worker:
    """The requests, one method each."""

    def __init__(self, scratch: str, threads: int, clock: str):
        import cases_bookkeeping
        import cases_compute
        import cases_methods
        import parity
        import timing
        import torch

        torch.set_num_threads(threads)
        timing.use_clock(clock)
        self.scratch = scratch
        self.cases = cases_compute.CASES | cases_bookkeeping.CASES | cases_methods.CASES
        self.parity = parity.RESULTS
        self.parts: dict = {}

    def describe(self) -> dict:
        """Who this is. Finds peft without importing it."""
        spec = importlib.util.find_spec("peft")
        if spec is None:
            raise RuntimeError(f"{sys.executable} finds no package peft")
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors")}
        return {"peft": "/".join(Path(spec.origin).parts[-3:]), "python": sys.version.split()[0], **versions}

    def write_adapters(self) -> dict:
        import fixtures

        fixtures.write_adapters(self.scratch)
        return {}

    def prepare(self, case: str, arguments: dict) -> dict:
        self.parts = {}
        gc.collect()
        self.parts = self.cases[case](self.scratch, **arguments)
        return {"parts": list(self.parts)}

    def measure(self, part: str) -> dict:
        return {"value": self.parts[part]()}

    def compute(self, result: str, arguments: dict) -> dict:
        """A result for the comparison of both contenders."""
        self.parts = {}
        return self.parity[result](self.scratch, **arguments)


if __name__ == "__main__":
    main()
