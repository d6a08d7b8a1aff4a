"""kill -9 at random moments: every resumed run must end with the bytes of the run that nobody killed.

    python benchmarks/kills.py [--kills 20] [--model FOLDER] [--steps 40] [--seed 0]

Prints one row a trial: the step that the log had reached, the checkpoint that the run went on from, and whether the
adapter, the optimizer state and all losses are the same. Exit code 1 if one differs. The processes are forks of one
that has loaded the libraries, so that a trial takes little longer than its training; POSIX only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

import yaml
from transformers.models.llama import modeling_llama  # noqa: F401  loaded once, for all forks

from peft_run import cli
from peft_run.run import Run
from peft_run.train import loop  # noqa: F401

START_LIMIT = 180  # seconds until a process must have reached its step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a folder, or a name that recipes know")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_recipe(folder, args)
        if end(start(folder, "recipe.yaml", "output.name=whole")):
            raise SystemExit((folder / "errors.txt").read_text())
        expected = fingerprint(Run.open(folder / "runs" / "whole"), args.steps)
        print("| trial | killed after step | went on from | same bytes |\n|--:|--:|--:|---|", flush=True)
        same = [trial(number, folder, args.steps, rng, expected) for number in range(1, args.kills + 1)]
    print(f"\n{sum(same)} of {len(same)} runs end with the same adapter, optimizer state and losses, byte for byte.")
    return 0 if all(same) else 1


def write_recipe(folder: Path, args: argparse.Namespace) -> None:
    """With dropout, accumulation, evaluations and several epochs: all that could lose its place."""
    rows = [{"instruction": f"Say {n * 37 % 101}.", "output": "done" if n % 2 else "no"} for n in range(60)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    every = max(1, args.steps // 7)
    settings = {
        "model": {"path": args.model, "dtype": "fp32"},
        "data": {"train": "data.jsonl"},
        "adapter": {"dropout": 0.1},
        "train": {
            "steps": args.steps,
            "batch": 3,
            "accumulate": 2,
            "lr": 1e-3,
            "save_every": every,
            "eval_every": every + 2,
            "threads": 1,
            "keep": "last",
        },
        "output": {"dir": "runs"},
        "track": {"plots": False},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))


def start(folder: Path, *arguments: str) -> int:
    """`peft train ARGUMENTS` in a process of its own, which says what it has to say in errors.txt; its id."""
    process = os.fork()
    if process:
        return process
    os.chdir(folder)
    os.dup2(os.open("errors.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.stderr.fileno())
    os._exit(cli.main(["train", *arguments, "--lang", "en"]))


def end(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def trial(number: int, folder: Path, steps: int, rng: random.Random, expected: list) -> bool:
    """Start, kill, resume, compare."""
    log = folder / "runs" / f"trial-{number}" / "latest" / "trainer_log.jsonl"
    step = rng.randrange(0, steps)  # 0: before the first step has ended
    process = start(folder, "recipe.yaml", f"output.name=trial-{number}")
    deadline = time.monotonic() + START_LIMIT
    while (not log.with_name("config.yaml").exists() or reached(log) < step) and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.3))  # into the next step, or a save
    os.kill(process, signal.SIGKILL)
    killed = end(process) == -signal.SIGKILL
    done = reached(log)
    run = Run.open(folder / "runs" / f"trial-{number}")
    from_step = "it had ended"
    if killed and not run.trained:
        code = end(start(folder, "--resume", str(run.path)))
        errors = (folder / "errors.txt").read_text()
        found = re.search(r"checkpoint of step (\d+)", errors)
        from_step = found[1] if found else "0"
        print(errors if code else "", end="", file=sys.stderr)
    same = run.trained and fingerprint(run, steps) == expected
    print(f"| {number} | {done} | {from_step} | {'yes' if same else 'NO'} |", flush=True)
    return same


def reached(log: Path) -> int:
    """The last step in the log."""
    try:
        return max(map(int, re.findall(r'"step": (\d+)', log.read_text())), default=0)
    except FileNotFoundError:
        return 0


def fingerprint(run: Run, steps: int) -> list:
    files = ("adapter_model.safetensors", f"checkpoint-{steps}/optimizer.safetensors")
    losses = [(event["step"], event.get("loss"), event.get("eval_loss")) for event in run.events()]
    return [*(hashlib.sha256((run / name).read_bytes()).hexdigest() for name in files), losses]


if __name__ == "__main__":
    sys.exit(main())
