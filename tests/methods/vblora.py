"""VB-LoRA: A and B made of vectors from a shared bank."""

import torch
from case import Case
from example import Example


def formula(config, tensors, weights, state):
    """Piece by piece."""
    bank, length = tensors["vblora_vector_bank"], config.vector_length

    def piece(logits):
        best = logits.argsort(descending=True)[: config.topk]
        shares = logits[best].exp() / logits[best].exp().sum()
        return sum(s * bank[i] for s, i in zip(shares, best))

    for path in [k.removesuffix(".vblora_logits_A") for k in tensors if k.endswith(".vblora_logits_A")]:
        A, B = tensors[f"{path}.vblora_logits_A"], tensors[f"{path}.vblora_logits_B"]
        A = torch.stack([torch.cat([piece(v) for v in row]) for row in A])
        B = torch.cat([torch.stack([piece(v) for v in column], 1) for column in B])
        assert A.shape[1] % length == 0
        name = f"{path}.weight"
        state[name] = state[name] + ((B @ A).T if config.fan_in_fan_out else B @ A)


def example(name, base, target, **config):
    """An example with a small bank, and changes large enough to show."""
    drop = "vblora_dropout" if config.get("vblora_dropout") else ""
    options = {"num_vectors": 6, "vector_length": 4, "init_vector_bank_bound": 1.0, "target_modules": target, **config}
    return Example(name, base, options, "VBLORA", oracle=formula, dropout=drop, identity=None)


EXAMPLES = [
    example("vblora", "mlp", ["lin0"]),
    example("vblora_topk", "sequence", ["lin0"], topk=3, r=2),
    example("vblora_transposed", "transposed", ["layer"], fan_in_fan_out=True),
    example("vblora_dropout", "mlp", ["lin0"], vblora_dropout=0.1),
]
QV = {
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
    "num_vectors": 12,
    "vector_length": 4,
    "init_vector_bank_bound": 1.0,
}
CLASS = {"config_class": "VBLoRAConfig"}
CASES = [
    Case("vblora", "llama", QV, **CLASS),
    Case("vblora_many", "llama", {**QV, "num_vectors": 300, "topk": 3, "r": 2, "target_modules": ["q_proj"]}, **CLASS),
    Case("vblora_gpt2", "gpt2", {**QV, "target_modules": ["c_attn"], "fan_in_fan_out": True}, **CLASS),
    Case("vblora_small", "llama", {**QV, "topk": 3, "save_only_topk_weights": True}, exact=False, **CLASS),
    Case(
        "vblora_small_many",
        "llama",
        {**QV, "num_vectors": 300, "target_modules": ["v_proj"], "save_only_topk_weights": True},
        exact=False,
        **CLASS,
    ),
]
