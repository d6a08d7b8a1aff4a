"""TinyLoRA: W + B(Σ vᵢPᵢ)A."""

from case import Case
from example import Example


def formula(config, tensors, weights, state):
    """P comes from the file, where examples keep it."""
    layers = [k.removesuffix(".tinylora_A") for k in tensors if k.endswith(".tinylora_A")]
    order = [p for p in dict.fromkeys(n.rpartition(".")[0] for n in weights) if p in layers]
    groups = sorted((k for k in tensors if k.startswith("tinylora_v.")), key=lambda k: int(k.rpartition(".")[2]))
    for i, path in enumerate(order):
        v = tensors[groups[min(i // max(1, len(order) // len(groups)), len(groups) - 1)]]
        R = (v[:, None, None] * tensors[f"{path}.tinylora_P"]).sum(0)
        delta = tensors[f"{path}.tinylora_B"] @ R @ tensors[f"{path}.tinylora_A"]
        name = f"{path}.weight"
        state[name] = state[name] + (delta.T if config.fan_in_fan_out else delta)


def example(name, base, target, **config):
    """An example with a short vector."""
    drop = "tinylora_dropout" if config.get("tinylora_dropout") else ""
    options = {"r": 3, "u": 5, "target_modules": target, **config}
    identity = 0.0 if config.get("init_weights", True) is True else None
    return Example(name, base, options, "TINYLORA", oracle=formula, dropout=drop, identity=identity)


EXAMPLES = [
    example("tinylora", "mlp", ["lin0", "lin1"]),
    example("tinylora_tied", "mlp", ["lin0", "lin1"], weight_tying=1.0),
    example("tinylora_transposed", "transposed", ["layer"], fan_in_fan_out=True),
    example("tinylora_embedding", "embedded", ["emb", "lin"]),
    example("tinylora_uniform", "sequence", ["lin0", "lin1"], init_weights="uniform", init_v_bound=1.0),
    example("tinylora_dropout", "mlp", ["lin0", "lin1"], tinylora_dropout=0.2),
]
QV = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM", "u": 6}
CLASS = {"config_class": "TinyLoraConfig"}
CASES = [
    Case("tinylora", "llama", QV, **CLASS),
    Case(
        "tinylora_seed", "llama", {**QV, "save_projection": False, "weight_tying": 0.5, "projection_seed": 3}, **CLASS
    ),
    Case("tinylora_gpt2", "gpt2", {"r": 3, "u": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True}, **CLASS),
    Case("tinylora_embedding", "embedded", {"r": 2, "u": 4, "target_modules": ["emb", "lin"]}, **CLASS),
]
