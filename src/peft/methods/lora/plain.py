"""A LoRA that subtracts its start, as an ordinary one that every reader knows."""

import dataclasses
import math

import torch

from peft.errors import ConfigError


def plain_form(tensors, config, adapters):
    """(tensors, config) of an ordinary LoRA of twice the rank: [A; A0] and [B, -B0] for adapters that subtract B0·A0.

    Any reader then computes the same on the base model as it is. alpha grows so that the scaling stays.
    """
    tensors, grow = dict(tensors), math.sqrt(2) if config.use_rslora else 2
    for adapter in adapters:
        if adapter.lora_start_A is None:
            raise ConfigError(f"{adapter.key} has no subtracted start, though other layers of its adapter have.")
        names = (
            ("lora_embedding_A", "lora_embedding_B") if adapter.lora_A is None else ("lora_A.weight", "lora_B.weight")
        )
        for name, start, dim in zip(names, (adapter.lora_start_A, -adapter.lora_start_B), (0, 1)):
            key = next(k for k in tensors if k.endswith(f"{adapter.key}.{name}"))
            tensors[key] = torch.cat([tensors[key], start.to(tensors[key])], dim=dim)
    return tensors, dataclasses.replace(
        config,
        r=2 * config.r,
        lora_alpha=config.lora_alpha * grow,
        rank_pattern={k: 2 * r for k, r in config.rank_pattern.items()},
        alpha_pattern={k: a * grow for k, a in config.alpha_pattern.items()},
        init_lora_weights=True,
        eva_config=None,
        corda_config=None,
        lora_ga_config=None,
    )
