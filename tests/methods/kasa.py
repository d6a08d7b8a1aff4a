"""KaSA: the smallest singular components of W give way to s·B·diag(d)·A."""

import torch
from case import Case
from example import Example


def formula(config, tensors, weights, state):
    """The first adapter on a layer takes the components away."""
    for key in [k for k in tensors if k.endswith("lora_diag")]:
        path = key.removesuffix(".lora_diag")
        name, s, flip = f"{path}.weight", config.lora_alpha / config.r, config.fan_in_fan_out
        A, B, d = tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"], tensors[key]
        delta = s * B @ torch.diag(d) @ A
        if torch.equal(state[name], weights[name]):
            U, S, Vh = torch.linalg.svd(weights[name].T if flip else weights[name], full_matrices=False)
            S[: -config.r] = 0
            delta = delta - U @ torch.diag(S) @ Vh
        state[name] = state[name] + (delta.T if flip else delta)
        if f"{path}.lora_B.bias" in tensors:
            state[f"{path}.bias"] = state[f"{path}.bias"] + s * tensors[f"{path}.lora_B.bias"]


def example(name, base="mlp", target=("lin0",), **config):
    config = {"r": 4, "lora_alpha": 6, "target_modules": list(target), "kasa_config": {}, **config}
    drop = "lora_dropout" if config.get("lora_dropout") else ""
    return Example(name, base, config, oracle=formula, identity=None, dropout=drop)


EXAMPLES = [
    example("kasa"),
    example("kasa_sequence", "sequence", ["lin0", "lin1"], rank_pattern={"lin1": 4}),
    example("kasa_bias", lora_bias=True),
    example("kasa_dropout", lora_dropout=0.2),
    example("kasa_transposed", "transposed", ["layer"], fan_in_fan_out=True),
]


def case(name, base="llama", second=None, settings=None, target=("q_proj", "down_proj"), **config):
    return Case(
        name,
        base,
        {"r": 4, "lora_alpha": 6, "target_modules": list(target), **config},
        second,
        variant=("kasa_config", "KasaConfig", settings or {}),
    )


CASES = [
    case("kasa_rslora", use_rslora=True, init_lora_weights=False, settings={"beta": 0.5, "gamma": 0.0}),
    case("kasa_bias", "llama_bias", lora_bias=True, rank_pattern={"down_proj": 2}),
    case("kasa_two", second={"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"]}),
]
