"""GraLoRA: a LoRA for each of k × k blocks of W."""

import torch
from case import Case
from example import Example


def formula(config, tensors, weights, state):
    """Block (j, n) of the update is the n-th part of B[j] times the j-th part of A[n]."""
    k, s = config.gralora_k, config.alpha / (config.r + config.hybrid_r)
    part = config.r // k
    for path in [p.removesuffix(".gralora_A") for p in tensors if p.endswith(".gralora_A")]:
        A, B = tensors[f"{path}.gralora_A"], tensors[f"{path}.gralora_B"]
        blocks = [
            [B[j][n * part : (n + 1) * part].T @ A[n][:, j * part : (j + 1) * part].T for n in range(k)]
            for j in range(k)
        ]
        delta = torch.cat([torch.cat(row, 1) for row in blocks])
        if config.hybrid_r:
            delta = delta + tensors[f"{path}.gralora_B_general.weight"] @ tensors[f"{path}.gralora_A_general.weight"]
        name = f"{path}.weight"
        state[name] = state[name] + s * (delta.T if config.fan_in_fan_out else delta)


def example(name, base, target, **config):
    """An example with a small rank."""
    drop = "gralora_dropout" if config.get("gralora_dropout") else ""
    options = {"r": 4, "alpha": 6, "target_modules": target, **config}
    identity = 0.0 if config.get("init_weights", True) else None
    return Example(name, base, options, "GRALORA", oracle=formula, dropout=drop, identity=identity)


EXAMPLES = [
    example("gralora", "mlp", ["lin0"]),
    example("gralora_k4", "sequence", ["lin0"], gralora_k=4),
    example("gralora_hybrid", "sequence", ["lin0"], hybrid_r=3),
    example("gralora_transposed", "transposed", ["layer"], fan_in_fan_out=True),
    example("gralora_random", "mlp", ["lin0"], init_weights=False),
    example("gralora_dropout", "mlp", ["lin0"], gralora_dropout=0.2),
    example("gralora_hybrid_dropout", "mlp", ["lin0"], hybrid_r=3, gralora_dropout=0.2),
]
QV = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM", "alpha": 8}
CLASS = {"config_class": "GraloraConfig"}
CASES = [
    Case("gralora", "llama", {**QV, "r": 4}, **CLASS),
    Case("gralora_hybrid", "llama", {**QV, "r": 8, "gralora_k": 4, "hybrid_r": 2}, **CLASS),
    Case("gralora_gpt2", "gpt2", {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True}, **CLASS),
]
