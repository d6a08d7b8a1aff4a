"""LoRA-GA: A and B start along the full weight's first gradient (arXiv 2407.05000)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from peft.core import match
from peft.core.defaults import LORA_TARGETS
from peft.errors import ConfigError
from peft.layers.linear import Conv1D

GRADIENT = "_peft_loraga_grad"  # the attribute of a base layer that holds its gradient until the adapter is made


@dataclass
class LoraGAConfig:
    """How the gradient's singular directions are dealt out. `stable_gamma` is for scale="stable"."""

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = field(
        default="ArB2r", metadata={"help": "which of the first 2r directions A and B get"}
    )
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = field(
        default="stable", metadata={"help": "how large they are"}
    )
    stable_gamma: int = field(default=16, metadata={"help": "B is out^(1/4) / sqrt(gamma) times its direction"})

    def __post_init__(self):
        for name, known in (
            ("direction", ("ArBr", "A2rBr", "ArB2r", "random")),
            ("scale", ("stable", "weight_svd", "gd_scale", "unit")),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(f"LoraGAConfig.{name} must be one of {known}, got {getattr(self, name)!r}.")


def preprocess_loraga(model, lora_config, train_step, cache_file=None):
    """Find the gradients that adapters made with init_lora_weights="lora_ga" start from.

    train_step(): forwards and backwards over some batches; called once. Gradients are averaged over the backwards.
    cache_file: read them from there if it exists, else write them there.
    Raises ValueError where the config lacks lora_ga_config, or no linear layer of the model is targeted.
    """
    if lora_config.lora_ga_config is None:
        raise ConfigError("LoRA-GA needs LoraConfig(init_lora_weights='lora_ga', lora_ga_config=LoraGAConfig(...)).")
    if lora_config.target_modules is None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if model_type not in LORA_TARGETS:
            raise ConfigError(f"Please specify `target_modules`: there is no default for {model_type!r} models.")
        lora_config.target_modules = set(LORA_TARGETS[model_type])
    layers = linear_targets(model, lora_config)
    for name, layer in layers.items():
        if not layer.weight.is_floating_point():
            raise ConfigError(
                f"LoRA-GA needs the gradient of {name}, whose weight is quantized ({layer.weight.dtype})."
            )
    cached = read_cache(cache_file, next(model.parameters()).device)
    if cached is not None:
        gradients = {name: cached[f"{name}.{GRADIENT}"] for name in layers}
    else:
        gradients = mean_gradients(model, layers, train_step)
    for name, gradient in gradients.items():
        setattr(layers[name], GRADIENT, gradient)
    if cached is None:
        write_cache(cache_file, {f"{name}.{GRADIENT}": g for name, g in gradients.items()})


def linear_targets(model, config):
    """{name: module} of the linear layers that a config targets. Raises ValueError where there is none."""
    found = {n: m for n, _, m in match.target_modules(model, config, ())[0]}
    found = {n: m for n, m in found.items() if isinstance(m, torch.nn.Linear) or Conv1D.owns(m)}
    if not found:
        raise ConfigError("No supported layers found: target_modules names no nn.Linear or Conv1D of the model.")
    return found


def read_cache(path, device):
    """The tensors of a file, or None where there is none."""
    return torch.load(path, map_location=device, weights_only=True) if path and Path(path).exists() else None


def write_cache(path, tensors):
    """Write tensors to a file; with path=None nothing."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.save(tensors, path)


def mean_gradients(model, layers, train_step):
    """{name: gradient of the weight}, in its own layout, averaged over the backwards; the model stays as it was."""
    training, before = model.training, [(p, p.requires_grad) for p in model.parameters()]
    backwards = dict.fromkeys(layers, 0)

    def counter(name):
        def count(module, grad_input, grad_output):
            backwards[name] += 1

        return count

    handles = [layer.register_full_backward_hook(counter(name)) for name, layer in layers.items()]
    try:
        model.train()
        for p, _ in before:
            p.requires_grad = False
        for layer in layers.values():
            layer.weight.requires_grad, layer.weight.grad = True, None
        with torch.enable_grad():
            train_step()
        return {n: m.weight.grad / backwards[n] for n, m in layers.items() if m.weight.grad is not None}
    finally:
        for handle in handles:
            handle.remove()
        for p, was in before:
            p.requires_grad = was
        for layer in layers.values():
            layer.weight.grad = None
        model.train(training)


def start(gradient, W, r, scaling, config):
    """(A, B) to start from. gradient, W: (out, in), float32."""
    U, S, V = torch.svd_lowrank(gradient, q=min(4 * r, *gradient.shape), niter=4)
    if len(S) < 2 * r:
        raise ConfigError(
            f"LoRA-GA needs 2r directions of the gradient, r={r}, but it is only {tuple(gradient.shape)}."
        )
    for_A, for_B = {
        "ArBr": (slice(1, 2 * r, 2), slice(0, 2 * r, 2)),
        "A2rBr": (slice(r, 2 * r), slice(r)),
        "ArB2r": (slice(r), slice(r, 2 * r)),
        "random": (chosen := torch.randperm(2 * r)[:r], chosen),
    }[config.direction]
    A, S_B = V.t()[for_A], S[for_B]
    B = U[:, for_B] * S_B
    if config.scale == "stable":
        B = B * (W.shape[0] ** 0.25 / config.stable_gamma**0.5)
    elif config.scale == "weight_svd":
        B = B * torch.linalg.matrix_norm(W, 2) / S_B[0].clamp(min=torch.finfo(S_B.dtype).tiny)
    elif config.scale == "gd_scale":
        A, B = A / scaling, B / scaling
    return A, B
