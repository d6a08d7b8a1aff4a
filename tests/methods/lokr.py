"""LoKr: W + alpha/r · W₁ ⊗ W₂."""

import torch
from case import Case
from example import Example

T = ["lin0", "lin1"]


def formula(config, tensors, weights, state):
    """delta[(l, k), (m, n), ...] = W₁[l, m] · W₂[k, n, ...]; a file may have either as its factors."""
    for path in sorted({k.rpartition(".")[0] for k in tensors}):
        held = {k.removeprefix(f"{path}.lokr_"): v for k, v in tensors.items() if k.startswith(f"{path}.")}
        w1 = held["w1"] if "w1" in held else held["w1_a"] @ held["w1_b"]
        w2, a, b, t = (held.get(k) for k in ("w2", "w2_a", "w2_b", "t2"))
        if w2 is None:
            w2 = a @ b if t is None else torch.einsum("ijxy,ip,jq->pqxy", t, a, b)
        W = state[f"{path}.weight"]
        transposed = W.ndim == 2 and len(w1) * len(w2) != len(W)
        out, inp = reversed(W.shape[:2]) if transposed else W.shape[:2]
        if "w2" in held and w2.ndim == 3:  # upstream's order of axes, so that its files mean the same
            delta = torch.einsum("lm,kns->klnms", w1, w2).reshape(out, inp, -1)
        else:
            w2 = w2.reshape(out // len(w1), inp // w1.shape[1], -1)
            delta = torch.einsum("lm,kns->lkmns", w1, w2).reshape(out, inp, -1)
        r = config.rank_pattern.get(path, config.r)
        delta = delta[..., 0].T if transposed else delta.reshape(W.shape)
        state[f"{path}.weight"] = W + config.alpha_pattern.get(path, config.alpha) / r * delta


def example(name, base, target, **config):
    """An example large enough that its effect shows: two small factors multiply."""
    drop = "rank_dropout" if config.get("rank_dropout") else ""
    config = {"r": 1, "alpha": 4, "target_modules": target, **config}
    identity = 0.0 if config.get("init_weights", True) else None
    return Example(name, base, config, "LOKR", oracle=formula, dropout=drop, identity=identity)


EXAMPLES = [
    example("lokr", "mlp", T),
    example("lokr_full", "sequence", T, r=4, alpha=12, decompose_factor=4),
    example("lokr_both", "no_bias", ["layer"], decompose_both=True, alpha=16),
    example("lokr_lycoris", "mlp", T, init_weights="lycoris"),
    example("lokr_random", "mlp", T, init_weights=False, alpha=16),
    example("lokr_patterns", "mlp", T, rank_pattern={"lin0": 3}, alpha_pattern={"lin1": 7}),
    example("lokr_transposed", "transposed", ["layer"]),
    example("lokr_conv1", "conv1", ["layer"]),
    example("lokr_conv1_effective", "conv1", ["layer"], use_effective_conv2d=True, alpha=16),
    example("lokr_conv2", "conv2", ["layer"]),
    example("lokr_conv2_full", "conv2", ["layer"], r=4, alpha=12),
    example("lokr_conv2_effective", "conv2", ["layer"], use_effective_conv2d=True, decompose_both=True, alpha=16),
    example("lokr_conv3", "conv3", ["layer"]),
    example("lokr_grouped", "grouped", ["layer"]),
    example("lokr_dilated", "dilated", ["layer"]),
    example("lokr_reflect", "reflect", ["layer"]),
    example("lokr_rank_dropout", "mlp", T, rank_dropout=0.2, rank_dropout_scale=True),
]
QV = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM", "alpha": 4}
CONVS = ["conv1", "conv2", "grouped", "head"]


def case(name, base, config, **more):
    """A case of this method."""
    return Case(name, base, config, config_class="LoKrConfig", **more)


CASES = [
    case("lokr", "llama", {"r": 1, **QV}, second={"r": 8, **QV, "alpha": 32}),
    case("lokr_both", "llama", {"r": 1, "decompose_both": True, "init_weights": "lycoris", **QV, "alpha": 64}),
    case("lokr_convs", "convs", {"r": 2, "alpha": 8, "target_modules": CONVS}),
    case(
        "lokr_effective",
        "convs",
        {"r": 1, "alpha": 16, "use_effective_conv2d": True, "decompose_factor": 2, "target_modules": CONVS[1:]},
    ),
    case("lokr_random", "mlp", {"r": 1, "alpha": 16, "init_weights": False, "target_modules": T}),
]
