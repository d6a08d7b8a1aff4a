"""kill -9 at random moments: every resumed run must end with the bytes of the run that nobody killed.

    python benchmarks/kills.py [--kills 20] [--model FOLDER] [--steps 40] [--seed 0]

Prints one row a trial: the step that the log had reached, the checkpoint that the run went on from, and whether
adapter, optimizer state and all losses are the same. Exit code 1 if one differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from peft_run.run import Run

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
        command(folder, "recipe.yaml", "output.name=whole").check_returncode()
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


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "peft_run", "train", *arguments], cwd=folder, capture_output=True, text=True
    )


def trial(number: int, folder: Path, steps: int, rng: random.Random, expected: list) -> bool:
    """Start, kill, resume, compare."""
    log = folder / "runs" / f"trial-{number}" / "latest" / "trainer_log.jsonl"
    step = rng.randrange(0, steps)  # 0: before the first step has ended
    process = subprocess.Popen(
        [sys.executable, "-m", "peft_run", "train", "recipe.yaml", f"output.name=trial-{number}"],
        cwd=folder,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + START_LIMIT
    while (
        (not log.with_name("config.yaml").exists() or reached(log) < step)
        and time.monotonic() < deadline
        and process.poll() is None
    ):
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.3))  # into the next step, or a save
    process.kill()
    process.wait()
    done = reached(log)
    run = Run.open(folder / "runs" / f"trial-{number}")
    from_step = "-"  # it had ended before the kill
    if not run.trained:
        resumed = command(folder, "--resume", os.fspath(run.path), "--lang", "en")
        found = re.search(r"checkpoint of step (\d+)", resumed.stderr)
        from_step = found[1] if found else "0"
        print(resumed.stderr if resumed.returncode else "", end="", file=sys.stderr)
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
