"""C3A: circulant blocks."""

import torch
from case import Case
from example import Example


def formula(config, tensors, weights, state):
    """Circular convolution by its definition."""
    for key in [k for k in tensors if k.endswith(".c3a_kernel")]:
        name, w = key.removesuffix(".c3a_kernel") + ".weight", tensors[key]
        M, N, b = w.shape
        delta = torch.zeros(M * b, N * b, dtype=torch.float64)
        for k in range(b):
            for j in range(b):
                delta[k::b, j::b] = w[:, :, (j - k) % b]
        state[name] = state[name] + delta / (N * b)


def example(name, base, target, **config):
    """An example that starts, and changes, enough to show."""
    identity = 0.0 if config.get("init_weights") is True else None
    options = {"block_size": 4, "init_weights": "gaussian", "target_modules": target, **config}
    return Example(name, base, options, "C3A", oracle=formula, identity=identity)


EXAMPLES = [
    example("c3a", "mlp", ["lin0"]),
    example("c3a_blocks", "sequence", ["lin0"], block_size_pattern={"lin0": 8}),
    example("c3a_no_bias", "no_bias", ["layer"], block_size=2),
    example("c3a_zero", "mlp", ["lin0"], block_size=8, init_weights=True),
]
QV = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM", "block_size": 4}
CLASS = {"config_class": "C3AConfig"}
CASES = [
    Case("c3a", "llama", {**QV, "init_weights": "gaussian"}, **CLASS),
    Case(
        "c3a_blocks", "llama", {**QV, "block_size_pattern": {"q_proj": 8}, "init_weights": "kaiming_uniform"}, **CLASS
    ),
    Case("c3a_bias", "llama_bias", {**QV, "block_size": 8, "bias": "c3a_only", "init_weights": "gaussian"}, **CLASS),
]
