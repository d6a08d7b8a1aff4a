"""Adapters for the server's tests, each of which says something of its own, and what collects an answer."""

import threading
from pathlib import Path

import torch

ADAPTERS = ("one", "two", "three")


def make_adapter(model: Path | str, folder: Path, seed: int, rank: int = 4) -> Path:
    from transformers import AutoModelForCausalLM

    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj", "down_proj"])
    tuned = get_peft_model(base, settings)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    tuned.save_pretrained(folder)
    return folder


def make_adapters(model: Path, folder: Path) -> dict[str, Path]:
    return {name: make_adapter(model, folder / name, seed, 2 + 2 * seed) for seed, name in enumerate(ADAPTERS)}


class Collect:
    """A request's sink."""

    def __init__(self) -> None:
        self.tokens, self.text, self.finish, self.error = [], "", None, None
        self.done = threading.Event()

    def __call__(self, piece) -> None:
        self.tokens += [chosen.token for chosen in piece.tokens]
        self.text += piece.text
        self.finish, self.error = piece.finish, piece.error
        if piece.finish or piece.error:
            self.done.set()


def finish(engine, sinks, timeout: float = 20) -> bool:
    """Wait for answers, then close the engine; whether all came."""
    came = sum(sink.done.wait(timeout) for sink in sinks) == len(sinks)
    return engine.close(timeout) and came
