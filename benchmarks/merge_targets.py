"""What each target of a merge from a quantized base keeps of an adapter, by the adapter's size; SmolLM2-135M.

    python benchmarks/merge_targets.py [--storage nf4|int8] [--sizes 0.03 0.1 0.3]

An adapter of size 0.03 changes each weight by 3 % of its norm; its factors are random. "of the weights" is the norm of
what a merge lost of the adapter's effect on them, relative to that effect; "of the outputs" the same for the logits of
32 tokens.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

import peft

TARGETS: list[tuple[str, dict[str, Any]]] = [
    ("requantized", {"force": True}),
    ("original", {"target": "original"}),
    ("dequantized, float32", {"target": "dequantized", "dtype": torch.float32}),
    ("dequantized, bfloat16", {"target": "dequantized", "dtype": torch.bfloat16}),
]


def quantized_base(folder: Path, storage: str) -> Any:
    """SmolLM2 in float32 with quantized linear layers."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=storage, bnb_4bit_compute_dtype=torch.float32)
        if storage in ("nf4", "fp4")
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=how)


@torch.no_grad()
def with_adapter(base: Any, size: float) -> Any:
    """A LoRA whose effect is `size` of each weight's norm."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    for layer in model.base_model.layers.values():
        ratio = layer.get_delta_weight("default").norm() / layer.base_weight().float().norm()
        layer.lora_B["default"].weight *= size / ratio
    return model


def main() -> int:
    from peft_run.models import smollm2

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", choices=("nf4", "fp4", "int8"), default="nf4")
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.03, 0.1, 0.3])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    folder = smollm2()
    base = quantized_base(folder, options.storage)
    print(f"| size | target ({options.storage}) | lost of the weights | worst layer | lost of the outputs |")
    print("|---|---|---|---|---|")
    for size in options.sizes:
        for name, how in TARGETS:
            how = {**how, "original": folder} if how.get("target") == "original" else how
            merged = with_adapter(copy.deepcopy(base), size).merge_and_unload(verify=True, **how)
            report = merged.merge_report
            outputs = "" if report.outputs.error is None else f"{report.outputs.error:.3f}"
            print(
                f"| {size:.0%} | {name} | {report.error:.3f} | {report.worst(1)[0].error:.3f} | {outputs} |", flush=True
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
