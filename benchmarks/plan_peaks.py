"""Planned against measured peaks: `python benchmarks/plan_peaks.py` prints the table and writes results/plan.md.

One process a configuration. It warms up on a model of the same kind with two narrow layers, so that libraries have
loaded what they load, and notes its resident memory. Then it builds the model with random weights, takes three
optimizer steps, and reads the highest resident memory of the last two. MALLOC_MMAP_THRESHOLD_ makes glibc give every
large block back to the system when it is freed; without that, what it keeps for later would be counted too.
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

HERE = Path(__file__).parent
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "OMP_NUM_THREADS": "1",
}
SMALL = {  # a model of 26M parameters
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 6400,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
# model, dtype, storage, method, batch, length, checkpointing
CONFIGURATIONS = [
    ("135M", "fp32", None, "full", 2, 128, False),
    ("135M", "fp32", None, "lora", 4, 128, False),
    ("135M", "fp32", None, "lora dropout", 4, 128, False),
    ("135M", "bf16", None, "lora", 4, 128, False),
    ("135M", "bf16", None, "lora dropout", 1, 512, True),
    ("135M", "bf16", "nf4", "lora", 4, 128, False),
    ("135M", "bf16", "nf4_double", "lora dropout", 1, 512, True),
    ("135M", "fp32", "int8", "lora", 2, 128, False),
    ("135M", "fp32", None, "ia3", 2, 256, False),
    ("135M", "fp32", None, "dora", 2, 128, False),
    ("26M", "fp32", None, "full", 8, 256, False),
    ("26M", "bf16", None, "full", 8, 256, False),
    ("26M", "fp32", None, "lora dropout", 16, 256, False),
    ("26M", "fp32", None, "lora", 16, 256, True),
    ("26M", "bf16", None, "lora", 16, 512, False),
    ("26M", "fp32", None, "prompt", 8, 256, False),
    ("26M", "fp32", "nf4", "lora", 8, 256, False),
    ("26M", "bf16", "int8", "lora", 8, 256, False),
]


def shape(model: str) -> dict:
    import fixtures

    return fixtures.SHAPE if model == "135M" else SMALL


def peft_config(method: str):
    import peft

    if method == "full":
        return None
    if method == "ia3":
        return peft.IA3Config(task_type="CAUSAL_LM")
    if method == "prompt":
        return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=16)
    dropout = 0.05 if method == "lora dropout" else 0.0
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=16,
        lora_alpha=32,
        lora_dropout=dropout,
        use_dora=method == "dora",
        target_modules="all-linear",
    )


def made(config, dtype: str, storage: str | None, method: str, checkpointing: bool):
    """The real model, ready to train, and its optimizer."""
    import fixtures
    import torch
    from transformers import LlamaForCausalLM

    import peft

    base = LlamaForCausalLM._from_config(config, dtype=fixtures.DTYPES[dtype])
    if storage is not None:
        fixtures.quantize(base, storage, fixtures.DTYPES[dtype])
    model = base if method == "full" else peft.get_peft_model(base, peft_config(method))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train(), torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)


def step(model, optimizer, batch: int, length: int, vocabulary: int) -> None:
    import torch

    ids = torch.randint(0, vocabulary, (batch, length))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measure(model: str, dtype: str, storage: str | None, method: str, batch: int, length: int, checkpoint: bool):
    import torch
    from cases_compute import resident_peak
    from transformers import LlamaConfig

    torch.manual_seed(0)
    sizes = shape(model)
    narrow = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    tiny = LlamaConfig(**{**sizes, **narrow, "num_hidden_layers": 2, "vocab_size": 512})
    for _ in range(2):
        step(*made(tiny, dtype, storage, method, checkpoint), 2, 64, 512)
    gc.collect()
    before = resident()
    trained, optimizer = made(LlamaConfig(**sizes), dtype, storage, method, checkpoint)
    step(trained, optimizer, batch, length, sizes["vocab_size"])
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):
        step(trained, optimizer, batch, length, sizes["vocab_size"])
    return resident_peak() - before


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def planned(model: str, dtype: str, storage: str | None, method: str, batch: int, length: int, checkpoint: bool):
    from transformers import LlamaConfig

    import peft

    return peft.plan(
        LlamaConfig(**shape(model)),
        peft_config(method),
        batch=batch,
        length=length,
        dtype=dtype,
        quantization=storage,
        gradient_checkpointing=checkpoint,
        device="cpu",
    )


def one(number: int) -> dict:
    configuration = CONFIGURATIONS[number]
    measured = measure(*configuration)
    start = time.process_time()
    plan = planned(*configuration)
    return {"planned": plan.peak, "measured": measured, "seconds": time.process_time() - start, "phase": plan.phase}


def table(rows: list[tuple[tuple, dict]]) -> str:
    lines = [
        "| model | dtype | stored in | method | batch x length | checkpointing | planned MiB | measured MiB | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (model, dtype, storage, method, batch, length, checkpoint), found in rows:
        ratio = found["planned"] / found["measured"]
        lines.append(
            f"| {model} | {dtype} | {storage or '-'} | {method} | {batch} x {length} | {'yes' if checkpoint else 'no'} "
            f"| {found['planned'] / 2**20:.0f} | {found['measured'] / 2**20:.0f} | {ratio:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", type=int, help="measure this configuration here, as JSON")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of configurations, counted from 0")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "plan.md")
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(one(arguments.one)))
        return
    rows = []
    for number in arguments.only or range(len(CONFIGURATIONS)):
        command = [sys.executable, __file__, "--one", str(number)]
        done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, stdout=subprocess.PIPE, text=True, check=True)
        rows.append((CONFIGURATIONS[number], json.loads(done.stdout.splitlines()[-1])))
        print(table(rows[-1:]).splitlines()[-1], rows[-1][1]["phase"], f"{rows[-1][1]['seconds']:.1f} s", flush=True)
        if arguments.only is None:
            arguments.output.write_text(report(rows), encoding="utf-8")


def report(rows: list[tuple[tuple, dict]]) -> str:
    import torch
    import transformers

    ratios = [found["planned"] / found["measured"] for _, found in rows]
    return (
        "# Planned and measured peaks\n\n"
        f"`python benchmarks/plan_peaks.py`, torch {torch.__version__}, transformers {transformers.__version__}, one "
        "CPU thread, random weights. Measured: the highest resident memory of the second and third optimizer step "
        "(AdamW), less the resident memory before the model was built; glibc gives large blocks back when they are "
        "freed (MALLOC_MMAP_THRESHOLD_=65536).\n\n"
        f"{table(rows)}\n\nRatios from {min(ratios):.2f} to {max(ratios):.2f}.\n"
    )


if __name__ == "__main__":
    main()
