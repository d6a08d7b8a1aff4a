"""HRA: the input through Householder reflections."""

import torch
from case import Case
from example import Example

T = ["lin0", "lin1"]


def formula(config, tensors, weights, state):
    for key in [k for k in tensors if k.endswith("hra_u")]:
        path, U = key.removesuffix(".hra_u"), tensors[key]
        U = torch.linalg.qr(U).Q if config.apply_GS else U / U.norm(dim=0)
        W = state[f"{path}.weight"]
        flat = W.T if path == "layer" and W.shape[0] == len(U) else W.flatten(1)
        for u in U.T:
            flat = flat - 2 * torch.outer(flat @ u, u)
        state[f"{path}.weight"] = flat.T if flat.shape != W.flatten(1).shape else flat.reshape(W.shape)


def example(name, base, target, *, identity=1e-6, **config):
    config = {"target_modules": target, "r": 4, **config}
    return Example(f"hra{name}", base, config, "HRA", oracle=formula, identity=identity)


EXAMPLES = [
    example("", "mlp", T),
    example("_sequence", "sequence", T, r=2),
    example("_no_bias", "no_bias", ["layer"]),
    example("_odd", "mlp", ["lin0"], r=3, identity=None),
    example("_orthogonal", "mlp", T, apply_GS=True, identity=None),
    example("_random", "mlp", T, init_weights=False, identity=None),
    example("_transposed", "transposed", ["layer"]),
    example("_conv", "conv2", ["layer"]),
    example("_conv_pointwise", "pointwise", ["layer"], r=2),
    example("_conv_circular", "circular", ["layer"], apply_GS=True, identity=None),
]
QV = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def case(name, base="llama", second=None, **config):
    config = {"r": 4, **config} if "target_modules" in config else {"r": 4, **config, **QV}
    return Case(name, base, config, second=second, config_class="HRAConfig")


CASES = [
    case("hra", second={"r": 2, **QV}),
    case("hra_orthogonal", apply_GS=True, init_weights=False),
    case("hra_odd", "llama_bias", r=3, bias="hra_only"),
    case("hra_conv", "convs", target_modules=["conv2", "head"]),
]
