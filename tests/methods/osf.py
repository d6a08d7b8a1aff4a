"""OSF: U·S·V in place of the lesser part of W."""

import torch
from case import Case
from example import Example


def formula(config, tensors, weights, state):
    """The greater part of W stays; the rest is what the file says."""
    for path in [k.removesuffix(".osf_svd_params.S_low") for k in tensors if k.endswith("S_low")]:
        U, S, V = (tensors[f"{path}.osf_svd_params.{n}_low"] for n in "USV")
        name = f"{path}.weight"
        turned = path == "layer" and weights[name].shape[1] == 12  # Conv1D's, which is (in, out)
        W = weights[name].T if turned else weights[name]
        u, s, v = torch.linalg.svd(W, full_matrices=False)
        k = len(s) - len(S)
        new = (u[:, :k] * s[:k]) @ v[:k] + (U * S) @ V
        state[name] = state[name] + ((new - W).T if turned else new - W)


def example(name, base, target, **config):
    """An example; gradients are not those of the formula, for they are projected."""
    identity = 0.0 if config.get("init_weights", True) else None
    return Example(name, base, {"target_modules": target, **config}, "OSF", oracle=formula, identity=identity,
                   projected=True, tolerance=6e-6)  # fmt: skip


EXAMPLES = [
    example("osf", "mlp", ["lin0", "lin1"], effective_rank=3),
    example("osf_half", "sequence", ["lin0", "lin1"]),
    example("osf_transposed", "transposed", ["layer"], effective_rank=8),
    example("osf_share", "no_bias", ["layer"], effective_rank=0.3),
    example("osf_pattern", "mlp", ["lin0", "lin1"], effective_rank=2, rank_pattern={"n1": 4}),
    example("osf_random", "mlp", ["lin0"], effective_rank=12, init_weights=False),
]
QV = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
CLASS = {"config_class": "OSFConfig"}
CASES = [
    Case("osf", "llama", {**QV, "effective_rank": 4}, {**QV, "effective_rank": 10}, **CLASS),
    Case("osf_half", "llama", QV, **CLASS),
    Case("osf_pattern", "llama_bias", {**QV, "effective_rank": 0.25, "rank_pattern": {"layers.1": 12}}, **CLASS),
]
