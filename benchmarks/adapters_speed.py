"""Training steps with bottleneck adapters, here and in the `adapters` library (AdapterHub), on models of equal shapes.

    python benchmarks/adapters_speed.py --adapters-python PATH

PATH is an interpreter with `adapters==1.3.0`. A step is a forward and backward in float32 without an optimizer, of a
batch that products bound and of one that Python does. The floor is what no library can go below: the base alone, with a
gradient wanted at the input of the second layer. Each library runs in a process of its own; their measurements take
turns. A figure is the least of all rounds. --clock cpu takes CPU time, for a busy machine.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src"
MODELS = ("bert", "llama")
VARIANTS = {"houlsby": "double_seq_bn", "pfeiffer": "seq_bn"}
SHAPE = {
    "hidden_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
    "vocab_size": 1000,
}
BATCHES = {"4 x 128": (4, 128), "1 x 32": (1, 32)}


def build(name: str):
    """A base model with random weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    more = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if name == "bert" else {}
    config, model = {"bert": ("BertConfig", "BertModel"), "llama": ("LlamaConfig", "LlamaModel")}[name]
    return getattr(transformers, model)(getattr(transformers, config)(**SHAPE, **more)).train()


def adapt(model, library: str, variant: str):
    """The model with adapters that are trained alone."""
    if library == "peft":
        import peft

        return peft.get_peft_model(model, peft.BottleneckConfig(variant=variant, reduction_factor=16)).train()
    import adapters

    adapters.init(model)
    model.add_adapter("one", config=adapters.AdapterConfig.load(VARIANTS[variant], reduction_factor=16))
    model.train_adapter("one")
    return model.train()


def worker(library: str) -> None:
    """Answer requests on stdin: {"model", "variant"} -> milliseconds of one step."""
    import torch

    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr
    ready: dict = {}
    for line in sys.stdin:
        asked = json.loads(line)
        key = asked["model"], asked["variant"]
        if key not in ready:
            model = build(key[0])
            ready[key] = floor_of(model) if key[1] == "floor" else adapt(model, library, key[1])
        ids = torch.randint(0, SHAPE["vocab_size"], BATCHES[asked["batch"]])
        answers.write(json.dumps(measure(ready[key], ids, asked["clock"])) + "\n")
        answers.flush()


def floor_of(model):
    """The frozen model; a gradient is wanted from the second layer on."""
    model.requires_grad_(False)
    layers = model.encoder.layer if hasattr(model, "encoder") else model.layers
    layers[1].register_forward_pre_hook(lambda module, args: (args[0].detach().requires_grad_(), *args[1:]))
    return model


def measure(model, ids, clock: str) -> float:
    """Milliseconds of a step: the best of three."""
    now = time.process_time if clock == "cpu" else time.perf_counter
    times = []
    gc.collect()
    gc.disable()
    for _ in range(3):
        start = now()
        model(input_ids=ids).last_hidden_state.square().mean().backward()
        times.append(now() - start)
        for p in model.parameters():
            p.grad = None
    gc.enable()
    return min(times) * 1000


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters-python", help="an interpreter with adapters==1.3.0")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--worker", choices=("peft", "adapters"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker)
        return
    workers = {"peft": start(sys.executable, "peft"), "adapters": start(options.adapters_python, "adapters")}
    print(
        f"ms of {options.clock} time, width {SHAPE['hidden_size']}, {SHAPE['num_hidden_layers']} layers, 1 thread, ",
        end="",
    )
    print(f"least of {options.rounds} rounds\n")
    print(
        "| model | adapters | tokens | floor | ours | floor, theirs | theirs | ours / theirs | added, ours / theirs |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for model in MODELS:
        for variant in VARIANTS:
            for batch in BATCHES:
                print(row(workers, model, variant, batch, options), flush=True)
    for process in workers.values():
        process.stdin.close()
        process.wait()


def start(python: str, library: str) -> subprocess.Popen:
    """A worker process, on one core."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(SOURCE) if library == "peft" else ""
    command = [python, "-W", "ignore", __file__, "--worker", library]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=environment)


def row(workers: dict, model: str, variant: str, batch: str, options) -> str:
    """One line of the table."""
    samples: dict = {(library, part): [] for library in workers for part in ("floor", variant)}
    for i in range(options.rounds + 1):
        for library in list(workers) if i % 2 else list(workers)[::-1]:
            for part in ("floor", variant):
                process = workers[library]
                asked = {"model": model, "variant": part, "batch": batch, "clock": options.clock}
                process.stdin.write(json.dumps(asked) + "\n")
                process.stdin.flush()
                value = json.loads(process.stdout.readline())
                if i:  # the first round warms up
                    samples[library, part].append(value)
    least = {key: min(values) for key, values in samples.items()}
    ours, theirs = least["peft", variant], least["adapters", variant]
    floor, their_floor = least["peft", "floor"], least["adapters", "floor"]
    cells = [f"{value:.1f}" for value in (floor, ours, their_floor, theirs)]
    cells += [f"{ours / theirs:.2f}", f"{(ours - floor) / (theirs - their_floor):.2f}"]
    return " | ".join([f"| {model}", variant, batch, *cells]) + " |"


if __name__ == "__main__":
    main()
