"""SHiRA: W + S."""

import torch
from case import Case
from example import Example


def formula(config, tensors, weights, state):
    """S has the trained values at its indices, (out, in)."""
    for key in [k for k in tensors if k.endswith(".shira_weight")]:
        path = key.removesuffix(".shira_weight")
        name, (rows, columns) = f"{path}.weight", tensors[f"{path}.shira_indices"].long()
        W = state[name].T if config.fan_in_fan_out else state[name]
        S = torch.zeros_like(W)
        for row, column, value in zip(rows, columns, tensors[key]):
            S[row, column] = value
        state[name] = state[name] + (S.T if config.fan_in_fan_out else S)


def example(name, base, target, **config):
    """An example with few entries."""
    about = {"identity": None} if config.get("init_weights") is False else {}
    return Example(name, base, {"r": 1, "target_modules": target, **config}, "SHIRA", oracle=formula, **about)


EXAMPLES = [
    example("shira", "mlp", ["lin0", "lin1"]),
    example("shira_sequence", "sequence", ["lin0"], r=2, random_seed=3),
    example("shira_no_bias", "no_bias", ["layer"]),
    example("shira_random", "mlp", ["lin0", "lin1"], init_weights=False),
    example("shira_transposed", "transposed", ["layer"], fan_in_fan_out=True),
]
QV = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
CASES = [
    Case("shira", "llama", QV, config_class="ShiraConfig", second={**QV, "r": 1, "random_seed": 5}),
    Case("shira_seed", "llama_bias", {**QV, "random_seed": 7, "init_weights": False}, config_class="ShiraConfig"),
    Case("shira_bert", "bert_classifier", {"r": 3, "task_type": "SEQ_CLS"}, config_class="ShiraConfig"),
]
