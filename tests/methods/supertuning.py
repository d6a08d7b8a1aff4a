"""SuperTuning: W + S + (alpha / r)·BA."""

import torch
from case import Case
from example import Example


def formula(config, tensors, weights, state):
    """S has the trained values at the largest or smallest entries of the base."""
    for key in [k for k in tensors if k.endswith(".supertuning_values")]:
        path, values = key.removesuffix(".supertuning_values"), tensors[key]
        name = f"{path}.weight"
        transposed = name == "layer.weight" and weights[name].shape == (16, 12)  # Conv1D
        W = weights[name].T if transposed else weights[name]
        order = W.float().abs().flatten().argsort(descending=config.select_top)
        S = torch.zeros_like(W).flatten()
        S[order[: len(values)]] = values
        S = S.view(W.shape)
        if config.r:
            A, B = (tensors[f"{path}.supertuning_lora_{n}.weight"] for n in "AB")
            S = S + config.lora_alpha / config.r * B @ A
        state[name] = state[name] + (S.T if transposed else S)


def example(name, base, target, **config):
    """An example with a tenth of the entries. Unsaved, they are others on a base of another dtype."""
    about = {"identity": None} if config.get("init_weights") is False else {}
    about |= {} if config.get("save_precomputed_indices", True) else {"half": {"single": 0.5}}
    drop = "lora_dropout" if config.get("lora_dropout") else ""
    config = {"sparsity": 0.9, "target_modules": target, **config}
    return Example(name, base, config, "SUPERTUNING", oracle=formula, dropout=drop, **about)


EXAMPLES = [
    example("supertuning", "mlp", ["lin0", "lin1"]),
    example("supertuning_smallest", "sequence", ["lin0"], select_top=False, sparsity=0.6),
    example("supertuning_unsaved", "no_bias", ["layer"], save_precomputed_indices=False),
    example("supertuning_lora", "mlp", ["lin0", "lin1"], r=3, lora_alpha=2.0),
    example("supertuning_dropout", "sequence", ["lin0", "lin1"], r=3, lora_dropout=0.2),
    example("supertuning_random", "mlp", ["lin0", "lin1"], r=2, init_weights=False),
    example("supertuning_transposed", "transposed", ["layer"], r=2),
]
QV = {"sparsity": 0.9, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
SUPER = "SupertuningConfig"
CASES = [
    Case("supertuning", "llama", QV, config_class=SUPER, second={**QV, "select_top": False}),
    Case("supertuning_unsaved", "llama", {**QV, "save_precomputed_indices": False}, config_class=SUPER),
    Case("supertuning_lora", "llama_bias", {**QV, "r": 4, "lora_alpha": 6.0, "lora_dropout": 0.1}, config_class=SUPER),
    Case("supertuning_random", "bert_classifier", {"sparsity": 0.95, "init_weights": False}, config_class=SUPER),
]
