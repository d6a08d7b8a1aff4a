"""FourierFT: W + scaling · Re of the inverse Fourier transform of a sparse spectrum."""

import torch
from case import Case
from example import Example

T = ["lin0", "lin1"]


def formula(config, tensors, weights, state):
    """Each coefficient is a plane wave; the seed chooses which frequencies."""
    for key in [k for k in tensors if k.endswith(".fourierft_spectrum")]:
        name = key.removesuffix("fourierft_spectrum") + "weight"
        W, c = state[name], tensors[key]
        out, inp = reversed(W.shape) if config.fan_in_fan_out else W.shape
        generator = torch.Generator().manual_seed(config.random_loc_seed)
        places = torch.randperm(out * inp, generator=generator)[: len(c)]
        o, i = torch.arange(out, dtype=torch.float64)[:, None], torch.arange(inp, dtype=torch.float64)
        delta = torch.zeros(out, inp, dtype=torch.float64)
        for value, place in zip(c, places):
            u, v = divmod(int(place), inp)
            delta += value * torch.cos(2 * torch.pi * (u * o / out + v * i / inp)) / (out * inp)
        delta = config.scaling * delta
        state[name] = W + (delta.T if config.fan_in_fan_out else delta)


def example(name, base, target, **config):
    """An example; up to five coefficients of the smaller layers are few enough for transforming x."""
    identity = 0.0 if config.get("init_weights") else None
    config = {"n_frequency": 5, "target_modules": target, **config}
    return Example(name, base, config, "FOURIERFT", oracle=formula, identity=identity)


EXAMPLES = [
    example("fourierft", "mlp", T, n_frequency_pattern={"lin1": 1}),
    example("fourierft_zeros", "sequence", T, init_weights=True, n_frequency_pattern={"lin1": 1}, scaling=300.0),
    example("fourierft_dense", "mlp", T, n_frequency=100, scaling=80.0),
    example("fourierft_dense_no_bias", "no_bias", ["layer"], n_frequency=50, random_loc_seed=3, scaling=50.0),
    example("fourierft_transposed", "transposed", ["layer"], fan_in_fan_out=True, n_frequency=3),
]
QV = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def case(name, base, config, **more):
    """A case of this method."""
    return Case(name, base, config, config_class="FourierFTConfig", **more)


CASES = [
    case("fourierft", "llama", {"n_frequency": 4, **QV}, second={"n_frequency": 60, "random_loc_seed": 5, **QV}),
    case(
        "fourierft_pattern",
        "llama_bias",
        {"n_frequency": 4, "n_frequency_pattern": {"v_proj": 20}, "init_weights": True, "bias": "fourier_only", **QV},
    ),
    case("fourierft_gpt2", "gpt2", {"n_frequency": 6, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    case("fourierft_mlp", "mlp", {"n_frequency": 30, "scaling": 60.0, "target_modules": T}),
]
