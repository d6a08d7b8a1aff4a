"""UniLoRA: A and B gathered from one vector."""

import numpy as np
import torch
from case import Case
from example import Example


def formula(config, tensors, weights, state):
    """Indices are dealt out layer by layer, A before B, in the order of the model."""
    paths = [p for p in dict.fromkeys(n.rpartition(".")[0] for n in weights) if p in config.target_modules]
    W = {p: weights[f"{p}.weight"].T if config.fan_in_fan_out else weights[f"{p}.weight"] for p in paths}
    total = sum(config.r * sum(w.shape) for w in W.values())
    each, left = divmod(total, config.theta_d_length)
    rng = np.random.default_rng(config.proj_seed)
    indices = list(np.repeat(np.arange(config.theta_d_length), each))
    indices = np.array(indices + (list(rng.choice(config.theta_d_length, left, replace=False)) if left else []))
    rng.shuffle(indices)
    indices = torch.from_numpy(indices)
    counts = torch.bincount(indices, minlength=config.theta_d_length)
    values = tensors["unilora_theta_d"][indices] / counts[indices].sqrt().float().double()
    for path, w in W.items():
        out, inp = w.shape
        A, B, values = values.split([config.r * inp, config.r * out, len(values) - config.r * (inp + out)])
        delta = B.view(out, config.r) @ A.view(config.r, inp)
        state[f"{path}.weight"] = state[f"{path}.weight"] + (delta.T if config.fan_in_fan_out else delta)


def example(name, base, target, **config):
    """An example that starts large enough for its changes to show."""
    drop = "unilora_dropout" if config.get("unilora_dropout") else ""
    options = {"theta_d_length": 32, "init_theta_d_bound": 1.0, "target_modules": target, **config}
    return Example(name, base, options, "UNILORA", oracle=formula, dropout=drop, identity=None)


EXAMPLES = [
    example("unilora", "mlp", ["lin0", "lin1"], init_weights=False),
    example("unilora_sequence", "sequence", ["lin0", "lin1"], r=2, proj_seed=7, init_weights=False),
    example("unilora_saved", "mlp", ["lin0"], save_indices=True, init_weights=False),
    example("unilora_transposed", "transposed", ["layer"], fan_in_fan_out=True, init_weights=False),
    example("unilora_dropout", "mlp", ["lin0", "lin1"], unilora_dropout=0.2, init_weights=False),
]
QV = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM", "init_theta_d_bound": 1.0}
CLASS = {"config_class": "UniLoraConfig"}
CASES = [
    Case("unilora", "llama", {**QV, "theta_d_length": 64}, **CLASS),
    Case("unilora_saved", "llama", {**QV, "r": 2, "save_indices": True, "theta_d_length": 48}, **CLASS),
    Case("unilora_gpt2", "gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "proj_seed": 1,
                                  "init_theta_d_bound": 1.0}, **CLASS),
]  # fmt: skip
