"""PEANuT: W + s·B·f(A W)."""

import torch
import torch.nn.functional as F
from case import Case
from example import Example

T = ["lin0", "lin1"]
ACT = {"relu": torch.relu, "tanh": torch.tanh, "silu": F.silu, "prelu": lambda h: F.leaky_relu(h, 0.25)}


def formula(config, tensors, weights, state):
    """Each column of W, a vector of `out` numbers, goes through the network."""
    act = ACT[config.act_fn]
    for key in [k for k in tensors if k.endswith("peanut_A.weight")]:
        path = key.removesuffix(".peanut_A.weight")
        of = {k.removeprefix(f"{path}.peanut_"): t for k, t in tensors.items() if k.startswith(f"{path}.")}
        stored, A = weights[f"{path}.weight"], of["A.weight"]
        W = stored if stored.shape[0] == A.shape[1] else stored.T
        columns = act(W.T @ A.T)
        skips = [columns]
        for i in range(config.depth):
            columns = act(columns @ of[f"encoders.{i}.weight"].T)
            skips.append(columns)
        skips.pop()
        for i in range(config.depth):
            columns = act(columns @ of[f"decoders.{i}.weight"].T) + skips.pop()
        delta = config.scaling * (columns @ of["B.weight"].T).T
        state[f"{path}.weight"] = state[f"{path}.weight"] + (delta if W is stored else delta.T)


def example(name, base, target, **config):
    """An example of width 6."""
    about = {"identity": None} if config.get("init_weights") is False else {}
    return Example(name, base, {"r": 6, "target_modules": target, **config}, "PEANUT", oracle=formula, **about)


EXAMPLES = [
    example("peanut", "mlp", T, scaling=3.0),
    example("peanut_sequence", "sequence", T, depth=1, act_fn="tanh"),
    example("peanut_no_bias", "no_bias", ["layer"], depth=2, act_fn="silu"),
    example("peanut_random", "mlp", T, depth=1, init_weights=False, act_fn="prelu"),
    example("peanut_transposed", "transposed", ["layer"], act_fn="tanh"),
]


def case(name, base="llama", tolerance=1e-5, **config):
    """A case of width 6 on a Llama."""
    config = {"r": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM", **config}
    return Case(f"peanut{name}", base, config, config_class="PeanutConfig", tolerance=tolerance)


CASES = [
    case("", act_fn="gelu_new", scaling=3.0, init_weights=False),
    case("_deep", depth=2, act_fn="tanh", target_modules=["k_proj", "up_proj"]),
    case("_prelu", depth=1, act_fn="prelu", init_weights=False, target_modules=["q_proj"]),
    case("_bf16", "llama_bf16", 0.02, depth=1, target_modules=["v_proj"]),
]
