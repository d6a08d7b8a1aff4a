"""Lily: shared A, routed mixture of shared B's. It is no fixed weight, so there is no formula for one."""

from case import Case
from example import Example


def example(name, base, target, **config):
    """An example with a small rank."""
    identity = 0.0 if config.get("init_weights", True) else None
    return Example(name, base, {"r": 4, "target_modules": target, **config}, "LILY", identity=identity, merges=False,
                   rows=False)  # fmt: skip


EXAMPLES = [
    example("lily", "mlp", ["lin0", "lin1"]),
    example("lily_three", "sequence", ["lin0", "lin1"], num_B=3, scaling=2.0),
    example("lily_random", "no_bias", ["layer"], init_weights=False),
]
QV = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM", "r": 4}
CLASS = {"config_class": "LilyConfig"}
CASES = [
    Case("lily", "llama", QV, **CLASS),
    Case("lily_stride", "llama", {**QV, "stride_A": 2, "num_B": 3}, **CLASS),
    Case("lily_scaled", "llama_bias", {**QV, "scaling": 3.0, "target_modules": r".*\.(q|k)_proj"}, **CLASS),
]
