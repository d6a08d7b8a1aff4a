"""A 7B model on a GPU: time and peak memory of a LoRA step, bfloat16, NF4 and int8, against upstream and the floor.

    python benchmarks/gpu.py --output results/gpu.md

Llama-2-7B's shape from a config with random weights; 1 x 2048 tokens, rank 16 on all linear layers, gradient
checkpointing. Needs bitsandbytes in both environments, and about 20 GB. "floor": the frozen model's forward and
backward to the embedding's output, without adapters. "prepared": after each library's
`prepare_model_for_kbit_training`.
`--device cpu --shape tiny --layers 2 --length 64` tries the script where there is no GPU; memory is the process's then.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import upstream
from fixtures import quantize
from torch import nn

SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "vocab_size": 1000},
}
STORAGES = ("bf16", "nf4", "nf4, prepared", "int8")
PARTS = ("floor", "upstream", "ours")
WARM = 2


def build(storage: str, options: argparse.Namespace) -> nn.Module:
    """The frozen base on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(options.device):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[options.shape], num_hidden_layers=options.layers))
    if storage != "bf16":
        quantize(model, storage.removesuffix(", prepared"), torch.bfloat16, options.device)
        setattr(model, "is_loaded_in_8bit" if storage == "int8" else "is_loaded_in_4bit", True)
        model.is_quantized = True
    torch.set_default_dtype(torch.float32)
    return model.requires_grad_(False)


def worker(storage: str, part: str, options: argparse.Namespace) -> dict:
    """Seconds of each step and the peak memory in bytes, of one contender in this process."""
    model = build(storage, options)
    how = {"use_reentrant": False}
    if part == "floor":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        model.enable_input_require_grads()
    else:
        import peft

        if storage.endswith("prepared"):
            model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=how)
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
            model.enable_input_require_grads()
        model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    optimizer = None if part == "floor" else torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model.train()
    ids = torch.randint(0, SHAPES[options.shape]["vocab_size"], (1, options.length), device=options.device)
    if options.device != "cpu":
        torch.cuda.reset_peak_memory_stats()  # the base was in bfloat16 before it was quantized
    seconds = []
    for _ in range(WARM + options.steps):
        wait(options.device)
        start = time.perf_counter()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        wait(options.device)
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[WARM:], "peak": peak(options.device)}


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def peak(device: str) -> int:
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(storage: str, part: str, options: argparse.Namespace) -> dict:
    """The worker's answer, from a fresh process in the environment of `part`."""
    theirs = part == "upstream"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if not theirs:
        environment["PYTHONPATH"] = str(Path(__file__).parent.parent / "src")
    command = [options.upstream_python or upstream.python() if theirs else sys.executable, "-W", "ignore", __file__]
    for name in ("device", "shape", "layers", "length", "steps"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(
        [*command, "--worker", storage, part], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{part}, {storage}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(found: dict[str, dict[str, dict]], options: argparse.Namespace) -> str:
    name = "CPU" if options.device == "cpu" else torch.cuda.get_device_name()
    lines = [
        f"`python benchmarks/gpu.py`: {name}, torch {torch.__version__}, {options.shape}, {options.layers} layers, "
        f"1 x {options.length} tokens, {options.steps} steps\n",
        "| base | step, floor | Hugging Face PEFT | here | | peak memory, floor | Hugging Face PEFT | here | |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for storage, parts in found.items():
        floor, theirs, ours = (statistics.median(parts[part]["seconds"]) for part in PARTS)
        peaks = [parts[part]["peak"] for part in PARTS]
        cells = [storage, *(f"{s:.3f} s" for s in (floor, theirs, ours)), f"{theirs / ours:.2f}x faster"]
        cells += [*(f"{b / 2**30:.2f} GiB" for b in peaks), f"{peaks[2] / peaks[1]:.2f}x"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--storages", nargs="+", choices=STORAGES, default=list(STORAGES))
    parser.add_argument("--upstream-python", help="an environment with upstream and bitsandbytes")
    parser.add_argument("--output", type=Path, metavar="FILE.md")
    parser.add_argument("--worker", nargs=2, metavar=("STORAGE", "PART"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(worker(*options.worker, options)))
        return
    found = {storage: {part: measure(storage, part, options) for part in PARTS} for storage in options.storages}
    text = table(found, options)
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
