"""Cases about everything around the arithmetic: import, wrap, load, switch, save, merge."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import fixtures
import torch
from timing import seconds

Parts = dict[str, Callable[[], float]]


def import_time(scratch: str, after: str) -> Parts:
    """To be asked of a fresh process; torch is loaded already, since this file needs it."""

    def measure() -> float:
        if after == "transformers":
            from transformers import LlamaForCausalLM

            assert LlamaForCausalLM

        def import_the_library() -> None:
            from peft import LoraConfig, get_peft_model

            assert LoraConfig and get_peft_model

        return seconds(import_the_library)

    return {"adapted": measure}


def wrap(scratch: str) -> Parts:
    from peft import get_peft_model

    def measure() -> float:
        model = fixtures.base_model("fp32")
        config = fixtures.lora_config()
        return seconds(lambda: get_peft_model(model, config))

    return {"adapted": measure}


def load(scratch: str, position: int) -> Parts:
    """Loading the adapter number `position` (counted from 1); the floor reads the same file."""
    from safetensors.torch import load_file

    model = fixtures.model_with_adapters("fp32", scratch, position - 1)
    directory = fixtures.adapter_directory(scratch, position - 1)
    file = Path(directory) / "adapter_model.safetensors"

    def measure() -> float:
        duration = seconds(lambda: model.load_adapter(directory, adapter_name="measured"))
        model.delete_adapter("measured")
        return duration

    return {"floor": lambda: seconds(lambda: load_file(file)), "adapted": measure}


def switch(scratch: str, adapters: int) -> Parts:
    model = fixtures.model_with_adapters("fp32", scratch, adapters)
    names = itertools.cycle(str(index) for index in range(adapters))
    return {"adapted": lambda: seconds(lambda: model.set_adapter(next(names)), adapters)}


def switch_and_forward(scratch: str, adapters: int) -> Parts:
    """Switching and then computing one token: shows work that a fast switch only put off until the next forward."""
    model = fixtures.model_with_adapters("fp32", scratch, adapters)
    names = itertools.cycle(str(index) for index in range(adapters))
    token = fixtures.tokens(1, 1)

    @torch.no_grad()
    def forward() -> None:
        model(input_ids=token, use_cache=False)

    def switch_then_forward() -> None:
        model.set_adapter(next(names))
        forward()

    return {"floor": lambda: seconds(forward, adapters), "adapted": lambda: seconds(switch_then_forward, adapters)}


def disable(scratch: str, adapters: int) -> Parts:
    model = fixtures.model_with_adapters("fp32", scratch, adapters)

    def enter_and_leave() -> None:
        with model.disable_adapter():
            pass

    return {"adapted": lambda: seconds(enter_and_leave, 5)}


def module_count(scratch: str, adapters: int) -> Parts:
    base = sum(1 for _ in fixtures.base_model("fp32").modules())
    model = fixtures.model_with_adapters("fp32", scratch, adapters)
    return {"floor": lambda: float(base), "adapted": lambda: float(sum(1 for _ in model.modules()))}


def save(scratch: str) -> Parts:
    """`save_pretrained`; the floor writes the same tensors to the same disk."""
    from safetensors.torch import load_file, save_file

    model = fixtures.adapted_model("fp32")
    target = Path(scratch) / "saved"
    tensors = load_file(Path(fixtures.adapter_directory(scratch, 0)) / "adapter_model.safetensors")

    def measure(write: Callable[[], object]) -> float:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        return seconds(write)

    return {
        "floor": lambda: measure(lambda: save_file(tensors, target / "adapter_model.safetensors")),
        "adapted": lambda: measure(lambda: model.save_pretrained(target)),
    }


def merge(scratch: str, dtype: str, operation: str) -> Parts:
    if operation == "merge_and_unload":

        def merge_a_new_model() -> float:
            return seconds(fixtures.adapted_model(dtype, own_weights=True).merge_and_unload)

        return {"adapted": merge_a_new_model}

    model = fixtures.adapted_model(dtype, own_weights=True).eval()

    def cycle() -> float:
        durations = {"merge": seconds(model.merge_adapter), "unmerge": seconds(model.unmerge_adapter)}
        return durations[operation]

    return {"adapted": cycle}


def unmerge_error(scratch: str, dtype: str) -> Parts:
    """Largest change that merging and unmerging leaves in any base weight."""
    model = fixtures.adapted_model(dtype, own_weights=True).eval()
    weights = fixtures.base_weights(dtype)

    def measure() -> float:
        model.merge_adapter()
        model.unmerge_adapter()
        restored = {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): parameter.detach()
            for name, parameter in model.named_parameters()
        }
        return max((restored[name].float() - weight.float()).abs().max().item() for name, weight in weights.items())

    return {"adapted": measure}


CASES = {
    "import": import_time,
    "wrap": wrap,
    "load": load,
    "switch": switch,
    "switch_and_forward": switch_and_forward,
    "disable": disable,
    "module_count": module_count,
    "save": save,
    "merge": merge,
    "unmerge_error": unmerge_error,
}
