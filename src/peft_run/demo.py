"""`peft demo`: fine-tune a small real model, show what changed, and prove that saving and merging lose nothing."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_run.errors import INTERRUPTED, RunError, UsageError
from peft_run.messages import LANGUAGES, Say, default_language
from peft_run.packages import require
from peft_run.progress import Output, clock_time

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from peft import PeftModel
    from peft_run.reviews import Review
    from peft_run.sentiment import SentimentTask

STEPS, QUICK_STEPS = 180, 3
QUICK_HELD_OUT = 32
BATCH = 8
LEARNING_RATE = 5e-4
PROOF_PROMPTS = 4
METRICS = "metrics.json"
QUANTIZED = ("nf4", "int8")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=positive, help=f"training steps (default: {STEPS})")
    parser.add_argument("--rank", type=positive, default=8, help="rank of the LoRA matrices (default: 8)")
    parser.add_argument("--quantize", choices=QUANTIZED, help="train on a base in 4 or 8 bits (QLoRA)")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: runs/demo")
    parser.add_argument("--seed", type=int, default=0, help="of the data split and the training (default: 0)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps: shows that it runs, learns nothing")
    parser.add_argument("--json", action="store_true", help="print the result as JSON; messages go to stderr")
    parser.add_argument("--lang", choices=LANGUAGES, default=default_language(), help="default: from the locale")


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def run(options: argparse.Namespace) -> int:
    for package in ("gguf", "transformers", "rich"):
        require(package, extra="demo")
    if options.quantize:
        require("bitsandbytes", extra="quant")
    if options.output.exists() and not options.output.is_dir():
        raise UsageError(f"--output {options.output} is a file; give a folder.")
    from peft_run import base

    base.quietly()
    output = Output(to_stderr=options.json)
    return tell_story(options, output, Say(options.lang, output.say))


def tell_story(options: argparse.Namespace, output: Output, say: Say) -> int:
    """The whole demo, in the order in which it happens."""
    import torch
    from transformers import AutoTokenizer

    from peft_run.models import smollm2
    from peft_run.precision import fastest_precision
    from peft_run.proof import TOLERANCE, prove
    from peft_run.reviews import load_reviews
    from peft_run.sentiment import SentimentTask, prompt_text

    start = time.monotonic()
    say("demo.task")
    base_folder = smollm2()
    say("demo.model", path=f"{base_folder}, {options.quantize}" if options.quantize else base_folder)
    training, held_out = load_reviews(options.seed)
    if options.quick:
        held_out = held_out[:QUICK_HELD_OUT]
    say("demo.data", train=len(training), held_out=len(held_out))
    precision = fastest_precision()
    say("demo.bf16" if precision.dtype == torch.bfloat16 else "demo.fp32", speedup=precision.speedup)

    torch.manual_seed(options.seed)
    task = SentimentTask(AutoTokenizer.from_pretrained(base_folder))
    # Wrapped before anything runs: peft keeps the scales that bitsandbytes rounds in its first evaluation on a CPU.
    model = with_lora(load_base(base_folder, precision.dtype, options.quantize), options.rank)
    before = task.score(model.get_base_model(), held_out)
    say("demo.before", **before._asdict())
    steps = options.steps or (QUICK_STEPS if options.quick else STEPS)
    taken = fine_tune(model, task, training, steps, options.seed, output, say)
    # Saved before anything else, so that no later trouble can lose the training. Old figures do not belong to it.
    (options.output / METRICS).unlink(missing_ok=True)
    model.save_pretrained(options.output)
    if taken < steps:
        say("demo.interrupted", step=taken, output=options.output)
        return INTERRUPTED

    after = task.score(model.get_base_model(), held_out)
    say("demo.after", **after._asdict())
    replies = compare_replies(model, task, held_out[:3], say)
    megabytes = sum(file.stat().st_size for file in options.output.glob("adapter_model.*")) / 1e6
    say("demo.saved", output=options.output, megabytes=megabytes)

    prompts = [task.prompt(review) for review in held_out[:PROOF_PROMPTS]]
    proof = prove(model, load_base(base_folder, torch.float32, options.quantize), options.output, prompts)
    differences = {"tolerance": TOLERANCE, **proof._asdict()}
    say("demo.proof", **differences)

    seconds = time.monotonic() - start
    result = {
        "base": str(base_folder),
        "quantized": options.quantize,
        "adapter": str(options.output),
        "steps": steps,
        "rank": options.rank,
        "seed": options.seed,
        "dtype": str(precision.dtype).removeprefix("torch."),
        "training_reviews": len(training),
        "held_out_reviews": len(held_out),
        "before": before._asdict(),
        "after": after._asdict(),
        "replies": replies,
        "largest_logit_difference": differences,
        "seconds": round(seconds, 1),
    }
    write_result(result, options)
    if not proof.holds:
        raise RunError(say.text("demo.proof_failed", **differences))
    say("demo.took", time=clock_time(seconds))
    say(
        "demo.next",
        model=base_folder,
        output=options.output,
        prompt=prompt_text(held_out[0]),
        more_steps=2 * max(steps, STEPS),
        more_rank=4 * options.rank,
    )
    return 0


def load_base(folder: Path, dtype: torch.dtype, quantize: str | None = None) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    from peft_run.precision import quantization

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **quantization(quantize, dtype))


def with_lora(base: PreTrainedModel, rank: int) -> PeftModel:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return get_peft_model(base, config)


def fine_tune(
    model: PeftModel,
    task: SentimentTask,
    reviews: Sequence[Review],
    steps: int,
    seed: int,
    output: Output,
    say: Say,
) -> int:
    from peft_run.training import train

    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    say("demo.training", trainable=trainable, total=total, share=trainable / total, steps=steps)
    base = model.get_base_model()
    with output.steps(steps) as report:
        return train(
            model,
            task.batches(reviews, BATCH, seed),
            lambda batch: task.loss(base, batch),
            steps=steps,
            learning_rate=LEARNING_RATE,
            report=report,
        )


def compare_replies(model: PeftModel, task: SentimentTask, reviews: Sequence[Review], say: Say) -> list[dict[str, str]]:
    """Held-out reviews as they come, not picked: also the wrong answers are shown."""
    from peft_run.sentiment import ANSWERS

    say("demo.replies")
    replies = []
    for review in reviews:
        tuned = task.reply(model, review)
        with model.disable_adapter():
            base = task.reply(model, review)
        replies.append({"review": review.text, "truth": ANSWERS[review.positive], "base": base, "tuned": tuned})
        say("demo.reply", **replies[-1])
    return replies


def write_result(result: dict[str, Any], options: argparse.Namespace) -> None:
    text = json.dumps(result, ensure_ascii=False, indent=2)
    (options.output / METRICS).write_text(text + "\n", encoding="utf-8")
    if options.json:
        print(text)
