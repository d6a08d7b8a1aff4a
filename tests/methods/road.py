"""RoAd: 2-D rotations and scalings of the output."""

import torch
from case import Case
from example import Example


def formula(config, tensors, weights, state):
    """R from its definition, entry by entry; R·W and R·b."""
    half = config.group_size // 2
    for path in [k.removesuffix(".road_theta") for k in tensors if k.endswith(".road_theta")]:
        theta, alpha = tensors[f"{path}.road_theta"], tensors[f"{path}.road_alpha"]
        W = state[f"{path}.weight"]
        R = torch.zeros(len(W), len(W), dtype=torch.float64)
        for i in range(len(W)):
            group, place = divmod(i, config.group_size)
            second = place >= half
            partner = i - half if second else i + half
            if config.variant == "road_1":
                at = (group * half + place % half,) * 2
            elif config.variant == "road_2":
                at = (i, i)
            else:
                at = (2 * group * config.group_size + place, (2 * group + 1) * config.group_size + place)
            R[i, i] = alpha[at[0]] * theta[at[0]].cos()
            R[i, partner] = alpha[at[1]] * theta[at[1]].sin() * (1 if second else -1)
        state[f"{path}.weight"] = R @ W
        if f"{path}.bias" in state:
            state[f"{path}.bias"] = R @ state[f"{path}.bias"]


def example(name, base, **config):
    """An example with small groups."""
    identity = None if config.get("init_weights") is False else 0.0
    target = ["layer"] if base == "no_bias" else ["lin0"]
    return Example(name, base, {"group_size": 4, "target_modules": target, **config}, "ROAD", oracle=formula,
                   identity=identity)  # fmt: skip


EXAMPLES = [
    example("road", "mlp"),
    example("road_2", "sequence", variant="road_2"),
    example("road_4", "mlp", variant="road_4", group_size=8),
    example("road_random", "mlp", init_weights=False),
    example("road_no_bias", "no_bias"),
]
QV = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "group_size": 8}
CLASS = {"config_class": "RoadConfig"}
CASES = [
    Case("road", "llama_bias", QV, **CLASS),
    Case("road_2", "llama", {**QV, "variant": "road_2"}, **CLASS),
    Case("road_4", "llama_bias", {**QV, "variant": "road_4", "group_size": 4}, **CLASS),
]
