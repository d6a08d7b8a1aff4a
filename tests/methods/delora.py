"""DeLoRA: normalised rank-one updates."""

from case import Case
from example import Example


def formula(config, tensors, weights, state):
    """One rank-one update at a time."""
    for path in [k.removesuffix(".delora_A") for k in tensors if k.endswith(".delora_A")]:
        A, B, strength = (tensors[f"{path}.delora_{n}"] for n in ("A", "B", "lambda"))
        W = weights[f"{path}.weight"]
        for a, b in zip(A, B.T):
            state[f"{path}.weight"] = state[f"{path}.weight"] + (
                strength / len(A) * (b / b.norm()).outer(a / a.norm()) * W.norm(dim=0)
            )


def example(name, base, target, **config):
    """An example with a small rank."""
    drop = "module_dropout" if config.get("module_dropout") else ""
    identity = 0.0 if config.get("init_weights", True) else None
    options = {"r": 3, "delora_lambda": 2, "target_modules": target, **config}
    return Example(name, base, options, "DELORA", oracle=formula, dropout=drop, identity=identity)


EXAMPLES = [
    example("delora", "mlp", ["lin0", "lin1"]),
    example("delora_patterns", "mlp", ["lin0", "lin1"], rank_pattern={"lin0": 2}, lambda_pattern={"lin1": 5.0}),
    example("delora_no_bias", "no_bias", ["layer"]),
    example("delora_random", "sequence", ["lin0", "lin1"], init_weights=False),
    example("delora_dropout", "mlp", ["lin0", "lin1"], module_dropout=0.2),
]
QV = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
CLASS = {"config_class": "DeloraConfig"}
CASES = [
    Case("delora", "llama", {**QV, "r": 4}, **CLASS),
    Case("delora_patterns", "llama", {**QV, "rank_pattern": {"q_proj": 2}, "lambda_pattern": {"v_proj": 7}}, **CLASS),
    Case("delora_random", "llama_bias", {**QV, "r": 2, "delora_lambda": 4, "init_weights": False}, **CLASS),
]
