"""LoHa: W + alpha/r · (A₁B₁)∘(A₂B₂)."""

import torch
from case import Case
from example import Example

T = ["lin0", "lin1"]


def formula(config, tensors, weights, state):
    """With t, the paper's proposition 3: each of the two is t contracted with a and b."""
    for key in [k for k in tensors if k.endswith(".hada_w1_a")]:
        path = key.removesuffix(".hada_w1_a")
        delta = 1
        for i in "12":
            a, b = tensors[f"{path}.hada_w{i}_a"], tensors[f"{path}.hada_w{i}_b"]
            t = tensors.get(f"{path}.hada_t{i}")
            delta = delta * (a @ b if t is None else torch.einsum("ijkl,ip,jq->pqkl", t, a, b))
        r = config.rank_pattern.get(path, config.r)
        name = f"{path}.weight"
        transposed = len(delta) != len(state[name])
        delta = delta.T if transposed else delta.reshape(state[name].shape)
        state[name] = state[name] + config.alpha_pattern.get(path, config.alpha) / r * delta


def example(name, base, target, **config):
    """An example large enough that its effect shows: two small factors multiply."""
    drop = "rank_dropout" if config.get("rank_dropout") else ""
    config = {"r": 2, "alpha": 16, "target_modules": target, **config}
    return Example(name, base, config, "LOHA", oracle=formula, dropout=drop)


EXAMPLES = [
    example("loha", "mlp", T),
    example("loha_sequence", "sequence", T, r=1, rank_pattern={"lin1": 3}, alpha_pattern={"lin0": 5}),
    example("loha_dense", "no_bias", ["layer"], r=6),
    example("loha_transposed", "transposed", ["layer"]),
    example("loha_conv1", "conv1", ["layer"], r=1),
    example("loha_conv1_effective", "conv1", ["layer"], use_effective_conv2d=True),
    example("loha_conv2", "conv2", ["layer"], r=1),
    example("loha_conv2_dense", "conv2", ["layer"], r=5),
    example("loha_conv2_effective", "conv2", ["layer"], r=1, use_effective_conv2d=True, alpha=40),
    example("loha_conv2_effective_dense", "conv2", ["layer"], r=4, use_effective_conv2d=True, alpha=80),
    example("loha_conv3", "conv3", ["layer"], r=1),
    example("loha_grouped", "grouped", ["layer"]),
    example("loha_dilated", "dilated", ["layer"], r=1),
    example("loha_circular", "circular", ["layer"], r=1),
    example("loha_rank_dropout", "mlp", T, rank_dropout=0.2),
    example("loha_rank_dropout_dense", "mlp", T, rank_dropout=0.2, r=6),
]
QV = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM", "alpha": 64}
CONVS = ["conv1", "conv2", "grouped", "head"]


def case(name, base, config, **more):
    """A case of this method."""
    return Case(name, base, config, config_class="LoHaConfig", **more)


CASES = [
    case("loha", "llama", {"r": 2, **QV}, second={"r": 3, "rank_pattern": {"q_proj": 1}, **QV}),
    case("loha_convs", "convs", {"r": 2, "alpha": 100, "target_modules": CONVS}),
    case("loha_effective", "convs", {"r": 2, "alpha": 400, "use_effective_conv2d": True, "target_modules": CONVS}),
    case("loha_wide", "mlp", {"r": 6, "alpha": 100, "target_modules": T, "init_weights": False}),
]
