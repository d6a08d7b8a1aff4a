"""Poly: W + (A·B)ᵀ / r, mixed for the task of a sample."""

import torch
from case import Case
from example import Example

IDS = [2, 0, 2, 1, 1, 0]
SAME = [1]  # one task for all samples, so that the layer has one weight


def formula(config, tensors, weights, state):
    """Only for examples whose samples all have task 1: the weight of that task."""
    for key in [k for k in tensors if k.endswith(".poly_lora_A")]:
        path = key.removesuffix(".poly_lora_A")
        A, B = tensors[key], tensors[f"{path}.poly_lora_B"]
        chosen = tensors[f"{path}.poly_router.module_logits"][1].sigmoid().view(config.n_splits, config.n_skills)
        chosen = chosen / chosen.sum(1, keepdim=True)
        A = torch.cat([sum(w * skill for w, skill in zip(*pair)) for pair in zip(chosen, A)])
        B = torch.cat([sum(w * skill for w, skill in zip(*pair)) for pair in zip(chosen, B)], dim=1)
        delta, name = (A @ B).T / config.r, f"{path}.weight"
        state[name] = state[name] + (delta.T if state[name].shape != delta.shape else delta)


def example(name, base, target, task_ids, **config):
    """An example of three tasks; in training, skills are drawn at random."""
    about = {"identity": None} if config.get("init_weights") is False else {}
    config = {"r": 2, "n_tasks": 3, "n_skills": 2, "target_modules": target, **config}
    return Example(
        name,
        base,
        config,
        "POLY",
        merges=False,
        random=True,
        oracle=formula if task_ids is SAME else None,
        call={"task_ids": torch.tensor(task_ids)},
        **about,
    )


EXAMPLES = [
    example("poly", "mlp", ["lin0", "lin1"], IDS),
    example("poly_one_task", "mlp", ["lin0", "lin1"], SAME),
    example("poly_sequence", "sequence", ["lin0"], [2, 0, 1], n_splits=4),
    example("poly_sequence_one_task", "sequence", ["lin0"], SAME, n_splits=4),
    example("poly_no_bias", "no_bias", ["layer"], IDS, n_splits=2),
    example("poly_random", "mlp", ["lin0", "lin1"], IDS, init_weights=False),
    example("poly_transposed", "transposed", ["layer"], SAME),
]
QV = {"r": 2, "n_tasks": 3, "n_skills": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
TASKS = {"config_class": "PolyConfig", "call": {"task_ids": torch.tensor([2, 1])}}
CASES = [
    Case("poly", "llama", QV, second={**QV, "r": 3, "n_skills": 3}, **TASKS),
    Case("poly_splits", "llama_bias", {**QV, "n_splits": 4, "init_weights": False}, **TASKS),
    Case("poly_t5", "t5", {"r": 1, "n_tasks": 3, "task_type": "SEQ_2_SEQ_LM"}, **TASKS),
]
