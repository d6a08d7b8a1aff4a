"""VB-LoRA: A and B mixed from the vectors of one bank."""

import torch
from case import Case
from example import Example


def mixed(logits, bank, k):
    """Each logit's vector with its weight among the k largest, 0 for the others."""
    kth = logits.sort(descending=True).values[..., k - 1 : k]
    return torch.where(logits >= kth, logits, -torch.inf).softmax(-1) @ bank


def formula(config, tensors, weights, state):
    """A's rows are made of parts; B's columns likewise."""
    for key in [k for k in tensors if k.endswith(".vblora_logits_A")]:
        path = key.removesuffix(".vblora_logits_A")
        A, B = (mixed(tensors[f"{path}.vblora_logits_{x}"], tensors["vblora_vector_bank"], config.topk) for x in "AB")
        A = torch.cat(list(A.unbind(1)), dim=-1)
        B = torch.cat([part.T for part in B.unbind(0)], dim=0)
        name = f"{path}.weight"
        state[name] = state[name] + (A.T @ B.T if config.fan_in_fan_out else B @ A)


def example(name, base, target, **config):
    """An example with a bank of large numbers, so that its effect shows."""
    drop = "vblora_dropout" if config.get("vblora_dropout") else ""
    small = {"r": 2, "num_vectors": 7, "vector_length": 4, "init_vector_bank_bound": 1.0, "init_logits_std": 1.0}
    config = {**small, "target_modules": target, **config}
    return Example(name, base, config, "VBLORA", oracle=formula, dropout=drop, identity=None)


EXAMPLES = [
    example("vblora", "mlp", ["lin0", "lin1"], vector_length=1),
    example("vblora_sequence", "sequence", ["lin0"], topk=3, vector_length=2, r=3),
    example("vblora_all", "mlp", ["lin0"], topk=7),
    example("vblora_transposed", "transposed", ["layer"], fan_in_fan_out=True),
    example("vblora_dropout", "mlp", ["lin0"], vblora_dropout=0.2),
]
QV = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM", "init_vector_bank_bound": 1.0}
BANK = {"num_vectors": 12, "vector_length": 8, **QV}
CLASS = {"config_class": "VBLoRAConfig"}
CASES = [
    Case("vblora", "llama", BANK, second={**BANK, "num_vectors": 9, "topk": 3}, **CLASS),
    Case("vblora_topk", "llama", {**BANK, "save_only_topk_weights": True}, **CLASS),
    Case("vblora_top3", "llama", {**BANK, "topk": 3, "num_vectors": 256, "save_only_topk_weights": True}, **CLASS),
    Case("vblora_gpt2", "gpt2", {**BANK, "target_modules": ["c_attn"], "fan_in_fan_out": True}, **CLASS),
]
