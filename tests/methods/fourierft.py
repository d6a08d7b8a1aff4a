"""FourierFT: a sparse spectrum."""

import math

import torch
from case import Case
from example import Example


def formula(config, tensors, weights, state):
    """A sum of plane waves."""
    for key in [k for k in tensors if k.endswith(".fourierft_spectrum")]:
        path, spectrum = key.removesuffix(".fourierft_spectrum"), tensors[key]
        W = weights[f"{path}.weight"]
        out, inp = W.T.shape if config.fan_in_fan_out else W.shape
        places = torch.randperm(out * inp, generator=torch.Generator().manual_seed(config.random_loc_seed))
        delta = torch.zeros(out, inp, dtype=torch.float64)
        o, i = torch.arange(out)[:, None], torch.arange(inp)
        for place, value in zip(places[: len(spectrum)].tolist(), spectrum):
            delta += value * torch.cos(2 * math.pi * (place // inp * o / out + place % inp * i / inp)) / (out * inp)
        delta = config.scaling * delta
        state[f"{path}.weight"] = state[f"{path}.weight"] + (delta.T if config.fan_in_fan_out else delta)


def example(name, base, target, **config):
    """An example with few numbers."""
    identity = 0.0 if config.get("init_weights") else None
    options = {"n_frequency": 20, "scaling": 15.0, "target_modules": target, **config}
    return Example(name, base, options, "FOURIERFT", oracle=formula, identity=identity, tolerance=8e-6)


EXAMPLES = [
    example("fourierft", "mlp", ["lin0", "lin1"], init_weights=True),
    example("fourierft_random", "sequence", ["lin0", "lin1"], random_loc_seed=3),
    example("fourierft_many", "mlp", ["lin0", "lin1"], n_frequency=40, n_frequency_pattern={"lin1": 100}),
    example("fourierft_transposed", "transposed", ["layer"], fan_in_fan_out=True),
]
QV = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM", "n_frequency": 30}
CLASS = {"config_class": "FourierFTConfig"}
CASES = [
    Case("fourierft", "llama", QV, **CLASS),
    Case("fourierft_pattern", "llama", {**QV, "n_frequency_pattern": {"q_proj": 50}, "random_loc_seed": 5}, **CLASS),
    Case("fourierft_gpt2", "gpt2", {"n_frequency": 25, "target_modules": ["c_attn"], "fan_in_fan_out": True,
                                    "scaling": 20.0}, **CLASS),
]  # fmt: skip
