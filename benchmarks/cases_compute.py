"""Cases about arithmetic: training steps, forwards and decoding, against the same model without adapters.

A case returns its parts: functions that do one measurement each. `floor` is what no adapter library can go below,
`adapted` is the library's time for the same work. Both parts run on one copy of the base weights.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import fixtures
import torch
from timing import seconds

Parts = dict[str, Callable[[], float]]


def step_timer(model, ids: torch.Tensor) -> Callable[[], float]:
    model.train()

    def measure() -> float:
        model.zero_grad(set_to_none=True)
        return seconds(lambda: model(input_ids=ids, labels=ids).loss.backward())

    return measure


def frozen_model(dtype: str):
    return fixtures.want_embedding_gradient(fixtures.base_model(dtype))


def step(
    scratch: str,
    dtype: str,
    rows: int = 4,
    length: int = 128,
    dropout: float = 0.0,
    dora: bool = False,
    prepare: bool = False,
) -> Parts:
    """Forward and backward, no optimizer."""
    ids = fixtures.tokens(rows, length)
    return {
        "floor": step_timer(frozen_model(dtype), ids),
        "adapted": step_timer(fixtures.adapted_model(dtype, dropout, dora, prepare=prepare), ids),
    }


def full_step(scratch: str, dtype: str, rows: int = 4, length: int = 128) -> Parts:
    """Full fine-tuning, without any library: where adapters have to be cheaper."""
    ids = fixtures.tokens(rows, length)
    return {
        "floor": step_timer(frozen_model(dtype), ids),
        "adapted": step_timer(fixtures.base_model(dtype).requires_grad_(True), ids),
    }


def saved_bytes(scratch: str, dtype: str, dropout: float, scope: str) -> Parts:
    ids = fixtures.tokens(4, 128)

    def count(model) -> float:
        return bytes_saved_for_backward(model.train(), ids, scope)

    return {
        "floor": lambda: count(frozen_model(dtype)),
        "adapted": lambda: count(fixtures.adapted_model(dtype, dropout)),
    }


def bytes_saved_for_backward(model, ids: torch.Tensor, scope: str) -> float:
    """Bytes of the distinct storages autograd keeps, without parameters; `scope` is "step" or "layers" (no LM head)."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}
    counting = scope == "step"

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if counting and storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def start_counting(module, args, kwargs) -> None:
        nonlocal counting
        counting = True

    def stop_counting(module, args, output) -> None:
        nonlocal counting
        counting = False

    if scope == "layers":
        decoder = next(module for module in model.modules() if type(module).__name__ == "LlamaModel")
        decoder.register_forward_pre_hook(start_counting, with_kwargs=True)
        decoder.register_forward_hook(stop_counting)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()  # the graph, and with it every counted storage, lives until here
    return float(sum(saved.values()))


def peak_memory(
    scratch: str, dtype: str, dropout: float, rows: int = 4, length: int = 128, prepare: bool = False
) -> Parts:
    """Peak resident bytes of the second step; to be asked of a process of its own."""
    ids = fixtures.tokens(rows, length)

    def peak(model) -> float:
        measure_step = step_timer(model, ids)
        measure_step()
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak that building the model left
        measure_step()
        return resident_peak()

    return {
        "floor": lambda: peak(frozen_model(dtype)),
        "adapted": lambda: peak(fixtures.adapted_model(dtype, dropout, prepare=prepare)),
    }


def resident_peak() -> float:
    status = Path("/proc/self/status").read_text()
    line = next((line for line in status.splitlines() if line.startswith("VmHWM")), None)
    kibibytes = int(line.split()[1]) if line else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024.0 * kibibytes


def forward(scratch: str, dtype: str, rows: int, length: int, dora: bool = False) -> Parts:
    """A prompt's forward, logits of its last token only, as generation does it."""
    ids = fixtures.tokens(rows, length)
    base = fixtures.base_model(dtype)
    adapted = fixtures.adapted_model(dtype, dora=dora).eval()
    return {"floor": prefill(base, ids), "adapted": prefill(adapted, ids)}


def prefill(model, ids: torch.Tensor, **arguments) -> Callable[[], float]:
    @torch.no_grad()
    def measure() -> float:
        return seconds(lambda: model(input_ids=ids, logits_to_keep=1, use_cache=False, **arguments))

    return measure


def decode(scratch: str, dtype: str, merged: bool = False, count: int = 64) -> Parts:
    """Seconds per token, one row, with a cache."""
    base = fixtures.base_model(dtype)
    adapted = fixtures.adapted_model(dtype, own_weights=merged).eval()
    if merged:
        adapted.merge_adapter()
    return {"floor": token_by_token(base, 1, count), "adapted": token_by_token(adapted, 1, count)}


def token_by_token(model, rows: int, count: int, **arguments) -> Callable[[], float]:
    prompt = fixtures.tokens(rows, 16)
    next_token = fixtures.tokens(rows, 1, seed=3)

    @torch.no_grad()
    def measure() -> float:
        cache = model(input_ids=prompt, use_cache=True, **arguments).past_key_values
        return seconds(lambda: model(input_ids=next_token, past_key_values=cache, use_cache=True, **arguments), count)

    return measure


def mixed_prefill(scratch: str, dtype: str, adapters: int, length: int = 128) -> Parts:
    """One row per adapter."""
    ids = fixtures.tokens(adapters, length)
    model = fixtures.model_with_adapters(dtype, scratch, adapters)
    names = [str(index) for index in range(adapters)]
    return {
        "floor": prefill(fixtures.base_model(dtype), ids),
        "adapted": prefill(model, ids, adapter_names=names),
    }


def mixed_decode(scratch: str, dtype: str, adapters: int, count: int = 32) -> Parts:
    model = fixtures.model_with_adapters(dtype, scratch, adapters)
    names = [str(index) for index in range(adapters)]
    return {
        "floor": token_by_token(fixtures.base_model(dtype), adapters, count),
        "adapted": token_by_token(model, adapters, count, adapter_names=names),
    }


CASES = {
    "step": step,
    "full_step": full_step,
    "saved_bytes": saved_bytes,
    "peak_memory": peak_memory,
    "forward": forward,
    "decode": decode,
    "mixed_prefill": mixed_prefill,
    "mixed_decode": mixed_decode,
}
