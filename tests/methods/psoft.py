"""PSOFT: the principal part of W turned by R."""

import torch
from case import Case
from example import Example


def formula(config, tensors, weights, state):
    """From the paper; singular directions in float32, whose signs R is made for."""
    r, s = config.r, config.psoft_alpha / config.r
    for path in [k.removesuffix(".psoft_R.weight") for k in tensors if k.endswith(".psoft_R.weight")]:
        W = weights[f"{path}.weight"]
        W = W.T if config.fan_in_fan_out else W
        v = tensors[f"{path}.psoft_R.weight"]
        eye = torch.eye(r, dtype=torch.float64)
        R = v
        if config.psoft_orth:
            Q = torch.zeros(r, r, dtype=torch.float64)
            Q[tuple(torch.triu_indices(r, r, 1))] = v
            Q = Q - Q.T
            if config.use_cayley_neumann:
                eps = config.cayley_neumann_eps
                Q = Q * min(1, eps / Q.norm()) if eps else Q
                R = eye + 2 * Q + 2 * Q @ Q + 2 * Q @ Q @ Q + Q @ Q @ Q @ Q
            else:
                R = (eye + Q) @ torch.linalg.inv(eye - Q)
        if config.psoft_mag_b:
            R = torch.diag(tensors[f"{path}.psoft_R.vector_b"]) @ R
        if config.psoft_mag_a:
            R = R @ torch.diag(tensors[f"{path}.psoft_R.vector_a"])
        U, S, V = (t.double() for t in torch.linalg.svd(W.float(), full_matrices=False))
        U, S, V = U[:, :r], S[:r] / s, V[:r]
        A, B = (V, U * S) if config.ab_svd_init == "psoft_init" else (S.sqrt()[:, None] * V, U * S.sqrt())
        delta = s * B @ (R - eye) @ A
        state[f"{path}.weight"] = state[f"{path}.weight"] + (delta.T if config.fan_in_fan_out else delta)


def example(name, base, target, **config):
    """An example with a small rank."""
    drop = "psoft_dropout" if config.get("psoft_dropout") else ""
    identity = 1e-6 if config.get("init_weights", True) else None
    options = {"r": 4, "psoft_alpha": 6, "target_modules": target, **config}
    return Example(name, base, options, "PSOFT", oracle=formula, dropout=drop, identity=identity, tolerance=4e-6)


EXAMPLES = [
    example("psoft", "mlp", ["lin0", "lin1"]),
    example("psoft_neumann", "sequence", ["lin0", "lin1"], use_cayley_neumann=True),
    example("psoft_bounded", "mlp", ["lin0"], use_cayley_neumann=True, cayley_neumann_eps=0.2),
    example("psoft_pissa", "mlp", ["lin0"], ab_svd_init="pissa_init", psoft_mag_a=False),
    example("psoft_free", "mlp", ["lin0"], psoft_orth=False, psoft_mag_b=False),
    example("psoft_transposed", "transposed", ["layer"], fan_in_fan_out=True),
    example("psoft_random", "mlp", ["lin0", "lin1"], init_weights=False),
    example("psoft_dropout", "mlp", ["lin0", "lin1"], psoft_dropout=0.1),
]
QV = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM", "r": 4}
CLASS = {"config_class": "PsoftConfig"}
CASES = [
    Case("psoft", "llama", QV, **CLASS),
    Case("psoft_neumann", "llama", {**QV, "use_cayley_neumann": True, "cayley_neumann_eps": 0.5,
                                    "psoft_svd": "lowrank", "random_seed": 3}, **CLASS),
    Case("psoft_free", "llama", {**QV, "psoft_orth": False, "ab_svd_init": "pissa_init"}, **CLASS),
]  # fmt: skip
