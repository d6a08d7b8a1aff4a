"""RandLoRA: W + s·Σᵢ Bᵢ·Λᵢ·A·Γᵢ, the transpose where there are more inputs than outputs."""

import torch
from case import Case
from example import Example

T = ["lin0", "lin1"]


def formula(config, tensors, weights, state):
    """Pairs (rank, base) of A, counted up with the base first, meet pairs (base, rank) of B, the rank first."""
    for key in [k for k in tensors if k.endswith(".randlora_lambda")]:
        path = key.removesuffix(".randlora_lambda")
        L, G = tensors[key], tensors[f"{path}.randlora_gamma"]
        name = f"{path}.weight"
        W = weights[name].T if config.fan_in_fan_out else weights[name]
        (r, n), wide, narrow = L.shape, max(W.shape), min(W.shape)
        delta = torch.zeros(wide, narrow, dtype=W.dtype)
        for j in range(r * n):
            column = tensors["randlora_B"][:wide, j // r, j % r]
            row = L[j // n, j % n] * tensors["randlora_A"][j // n, 0, :narrow] * G[j % n]
            delta += torch.outer(column, row)
        delta = config.randlora_alpha / r * (delta if narrow == W.shape[1] else delta.T)
        state[name] = state[name] + (delta.T if config.fan_in_fan_out else delta)


def example(name, base, target, **config):
    """An example with a scaling that suits narrow layers."""
    config = {"r": 3, "randlora_alpha": 6, "target_modules": target, **config}
    drop = "randlora_dropout" if config.get("randlora_dropout") else ""
    return Example(name, base, config, "RANDLORA", oracle=formula, dropout=drop)


EXAMPLES = [
    example("randlora", "mlp", T),
    example("randlora_sequence", "sequence", T, r=2),
    example("randlora_sparse", "sequence", T, sparse=True),
    example("randlora_very_sparse", "mlp", T, very_sparse=True, r=5),
    example("randlora_transposed", "transposed", ["layer"], fan_in_fan_out=True),
    example("randlora_dropout", "mlp", T, randlora_dropout=0.2),
]
QV = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM", "randlora_alpha": 40}
CLASS = {"config_class": "RandLoraConfig"}
CASES = [
    Case("randlora", "llama", {"r": 8, **QV}, second={"r": 8, **QV, "randlora_alpha": 20}, **CLASS),
    Case("randlora_seed", "llama", {"r": 7, "save_projection": False, "projection_prng_key": 7, **QV}, **CLASS),
    Case("randlora_sparse", "llama", {"r": 8, "save_projection": False, "sparse": True, **QV}, **CLASS),
    Case("randlora_gpt2", "gpt2", {"r": 8, "target_modules": ["c_attn"], "fan_in_fan_out": True}, **CLASS),
]
