"""ReFT: where all positions are changed, a linear layer as a block has W' = (I + Rᵀ(W - R)) W0, and so has its bias."""

import torch
from example import Example


def gram_schmidt(P):
    """Orthonormal rows."""
    rows = []
    for p in P:
        for q in rows:
            p = p - (p @ q) * q
        rows.append(p / p.norm())
    return torch.stack(rows)


def formula(config, tensors, weights, state):
    """For examples that change all positions alike."""
    for key in [k for k in tensors if k.endswith(".reft_R")]:
        path = key.removesuffix(".reft_R")
        R, W, b = (tensors[f"{path}.reft_{name}"][0] for name in "RWb")
        R = gram_schmidt(R) if config.variant == "loreft" else R
        turn = torch.eye(R.shape[1], dtype=R.dtype) + R.T @ (W if config.variant == "direft" else W - R)
        state[f"{path}.weight"] = turn @ state[f"{path}.weight"]
        state[f"{path}.bias"] = turn @ state[f"{path}.bias"] + R.T @ b


def example(name, base, target=("lin0", "lin1"), **config):
    """An example; it cannot be merged, as it changes hidden states."""
    about = {"identity": None} if config.get("init_weights") is False else {}
    about |= {"dropout": "dropout"} if config.get("dropout") else {}
    about |= {"oracle": formula} if config.get("positions") == "all" else {}
    return Example(name, base, {"r": 3, "target_modules": list(target), **config}, "REFT", merges=False, **about)


EXAMPLES = [
    example("reft", "sequence", positions="all"),
    example("noreft", "sequence", positions="all", variant="noreft"),
    example("direft", "sequence", positions="all", variant="direft"),
    example("reft_vectors", "mlp", positions="all"),
    example("reft_ends", "sequence", prefix_positions=1, suffix_positions=2),
    example(
        "direft_ends", "sequence", variant="direft", prefix_positions=2, suffix_positions=1, intervention_per="side"
    ),
    example("reft_listed", "sequence", positions=[0, 3, -2], intervention_per="position"),
    example("reft_random", "sequence", ["lin0"], init_weights=False, prefix_positions=2),
    example("reft_dropout", "sequence", ["lin1"], positions="all", dropout=0.2),
    example("reft_embedding", "embedded", ["lin"], prefix_positions=2, suffix_positions=0),
]
CASES = []
