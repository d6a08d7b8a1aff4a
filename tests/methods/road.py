"""RoAd: pairs of outputs, rotated and scaled."""

import torch
from case import Case
from example import Example

T = ["lin0"]


def formula(config, tensors, weights, state):
    half = config.group_size // 2
    for key in [k for k in tensors if k.endswith("road_theta")]:
        path = key.removesuffix(".road_theta")
        theta, alpha = tensors[key], tensors[f"{path}.road_alpha"]
        c, s = alpha * theta.cos(), alpha * theta.sin()
        out = state[f"{path}.weight"].shape[0]
        R = torch.zeros(out, out, dtype=theta.dtype)
        for group in range(out // config.group_size):
            for j in range(half):
                i, k = group * config.group_size + j, group * config.group_size + j + half
                if config.variant == "road_1":
                    n = group * half + j
                    numbers = c[n], s[n], s[n], c[n]
                elif config.variant == "road_2":
                    numbers = c[i], s[i], s[k], c[k]
                else:
                    n = 4 * group * half + j
                    numbers = c[n], s[n + 2 * half], s[n + 3 * half], c[n + half]
                R[i, i], R[i, k], R[k, i], R[k, k] = numbers[0], -numbers[1], numbers[2], numbers[3]
        state[f"{path}.weight"] = R @ state[f"{path}.weight"]
        if f"{path}.bias" in state:
            state[f"{path}.bias"] = R @ state[f"{path}.bias"]


def example(name, base, target, *, identity=0.0, **config):
    config = {"target_modules": target, "group_size": 4, **config}
    return Example(f"road{name}", base, config, "ROAD", oracle=formula, identity=identity)


EXAMPLES = [
    example("", "mlp", T),
    example("_sequence", "sequence", T, group_size=8),
    example("_rows", "mlp", T, variant="road_2"),
    example("_numbers", "sequence", T, variant="road_4", group_size=8),
    example("_no_bias", "no_bias", ["layer"], variant="road_2"),
    example("_random", "mlp", T, init_weights=False, identity=None),
]
QV = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def case(name, base="llama", second=None, **config):
    return Case(name, base, {"group_size": 8, **QV, **config}, second=second, config_class="RoadConfig")


CASES = [
    case("road", second={"group_size": 4, "variant": "road_4", **QV}),
    case("road_rows", "llama_bias", variant="road_2"),
    case("road_numbers", variant="road_4", init_weights=False),
]
