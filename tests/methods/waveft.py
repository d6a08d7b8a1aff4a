"""WaveFT: W + scaling · inverse wavelet transform of a sparse matrix of coefficients."""

import torch
from case import Case
from example import Example

T = ["lin0", "lin1"]
R2, R3, R7 = (torch.tensor(x, dtype=torch.float64).sqrt() for x in (2, 3, 7))
LOW = {  # filters in closed form
    "db1": torch.stack([1 / R2, 1 / R2]),
    "db2": torch.stack([1 + R3, 3 + R3, 3 - R3, 1 - R3]) / (4 * R2),
    "coif1": torch.stack([1 - R7, 5 + R7, 14 + 2 * R7, 14 - 2 * R7, 1 - R7, R7 - 3]) / (16 * R2),
}


def placed(filters, k, high, n):
    """A filter in n features: number k, counted from half the filter's length before the first, cut at both ends."""
    f = filters[high]
    line = torch.zeros(n + 4 * len(f), dtype=torch.float64)
    start = 2 * k + 2  # len(f) more than where it begins
    line[start : start + len(f)] = f
    return line[len(f) : len(f) + n]


def formula(config, tensors, weights, state):
    """Each coefficient is a patch, the outer product of two filters; the seed chooses which."""
    low = LOW[config.wavelet_family]
    filters, q = (low, low.flip(0) * torch.tensor([1.0, -1.0]).repeat(len(low) // 2)), len(low) // 2 - 1
    keys = [k for k in tensors if k.endswith(".waveft_spectrum")]
    shapes = {k: state[k.removesuffix("waveft_spectrum") + "weight"].shape for k in keys}
    for key in keys:
        name, c = key.removesuffix("waveft_spectrum") + "weight", tensors[key]
        out, inp = reversed(shapes[key]) if config.fan_in_fan_out else shapes[key]
        if config.proportional_parameters:
            mean = sum(s.numel() for s in shapes.values()) / len(shapes)
            assert len(c) == round(config.n_frequency * out * inp / mean)
        places = torch.randperm(out * inp, generator=torch.Generator().manual_seed(config.random_loc_seed))[: len(c)]
        delta = torch.zeros(out, inp, dtype=torch.float64)
        for value, place in zip(c, places):
            o, i = divmod(int(place), inp)
            if not config.use_idwt:
                delta[o, i] += value
                continue
            below, right = o >= -(-out // 2), i >= -(-inp // 2)
            row, col = o - below * -(-out // 2) + q * (not below), i - right * -(-inp // 2) + q * (not right)
            delta += value * torch.outer(placed(filters, row, right, out), placed(filters, col, below, inp))
        state[name] = state[name] + config.scaling * (delta.T if config.fan_in_fan_out else delta)


def example(name, base, target, **config):
    """An example that starts, and changes, enough to show; 24 coefficients of lin0 are few enough to transform x."""
    identity = None if config.get("init_weights") is False else 0.0
    return Example(name, base, {"target_modules": target, **config}, "WAVEFT", oracle=formula, identity=identity)


EXAMPLES = [
    example("waveft", "mlp", T, n_frequency=24, init_weights=False, n_frequency_pattern={"lin1": 7}),
    example("waveft_db2", "sequence", T, n_frequency=7, wavelet_family="db2", random_loc_seed=3),
    example("waveft_coif1", "no_bias", ["layer"], n_frequency=9, wavelet_family="coif1", init_weights=False),
    example("waveft_dense", "mlp", T, n_frequency=100, wavelet_family="db2", scaling=8.0),
    example("waveft_entries", "mlp", T, n_frequency=7, use_idwt=False),
    example("waveft_proportional", "mlp", T, n_frequency=14, proportional_parameters=True),
    example("waveft_transposed", "transposed", ["layer"], fan_in_fan_out=True, n_frequency=8, wavelet_family="coif1"),
]
QV = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM", "init_weights": False}


def case(name, base, config, **more):
    """A case of this method."""
    return Case(name, base, config, config_class="WaveFTConfig", **more)


CASES = [
    case(
        "waveft",
        "llama",
        {"n_frequency": 9, **QV},
        second={"n_frequency": 90, "random_loc_seed": 5, "wavelet_family": "sym5", **QV},
    ),
    case(
        "waveft_pattern",
        "llama_bias",
        {"n_frequency": 4, "n_frequency_pattern": {"v_proj": 20}, "use_idwt": False, "bias": "waveft_only", **QV},
    ),
    case("waveft_proportional", "llama", {"n_frequency": 12, "proportional_parameters": True, **QV}),
    case(
        "waveft_gpt2",
        "gpt2",
        {
            "n_frequency": 40,
            "wavelet_family": "db7",
            "target_modules": ["c_attn"],
            "init_weights": False,
            "fan_in_fan_out": True,
        },
    ),
    case("waveft_coif4", "mlp", {"n_frequency": 7, "wavelet_family": "coif4", "target_modules": T}),
]
