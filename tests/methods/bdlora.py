"""BD-LoRA: A or B is block-diagonal."""

import torch
from case import Case
from example import Example


def formula(config, tensors, weights, state):
    """Blocks go along the diagonal of A or of B."""
    for key in [k for k in tensors if k.endswith("lora_A.weight")]:
        path = key.removesuffix(".lora_A.weight")
        A, B, n = tensors[key], tensors[f"{path}.lora_B.weight"], config.use_bdlora.nblocks
        W = weights[f"{path}.weight"]
        W = W.T if config.fan_in_fan_out else W
        if A.shape[1] < W.shape[1]:
            A = torch.block_diag(*A.chunk(n))
        if B.shape[1] < A.shape[0]:
            B = torch.block_diag(*B.chunk(n))
        delta = B @ A * config.lora_alpha / config.r
        state[f"{path}.weight"] = state[f"{path}.weight"] + (delta.T if config.fan_in_fan_out else delta)
        if f"{path}.lora_B.bias" in tensors:
            state[f"{path}.bias"] = (
                state[f"{path}.bias"] + tensors[f"{path}.lora_B.bias"] * config.lora_alpha / config.r
            )


IN_A = {"target_modules_bd_a": ["lin"], "nblocks": 4}
IN_B = {"target_modules_bd_b": ["lin0"], "nblocks": 2, "match_strict": False}


def example(name, base="mlp", target=("lin0", "lin1"), blocks=IN_A, **config):
    config = {"r": 4, "lora_alpha": 6, "target_modules": list(target), "use_bdlora": blocks, **config}
    drop = "lora_dropout" if config.get("lora_dropout") else ""
    near = None if config.get("init_lora_weights") is False else 0.0
    return Example(name, base, config, oracle=formula, identity=near, dropout=drop)


EXAMPLES = [
    example("bdlora"),
    example("bdlora_b", blocks=IN_B),
    example("bdlora_sequence", "sequence"),
    example("bdlora_bias", lora_bias=True),
    example("bdlora_random", init_lora_weights=False),
    example(
        "bdlora_transposed",
        "transposed",
        ["layer"],
        {"target_modules_bd_b": ["layer"], "nblocks": 4},
        fan_in_fan_out=True,
    ),
    example("bdlora_dropout", lora_dropout=0.2),
]


def case(name, base="llama", r=4, target=("q_proj", "o_proj", "down_proj"), blocks=None, **config):
    return Case(
        name,
        base,
        {"r": r, "lora_alpha": 6, "target_modules": list(target), **config},
        variant=("use_bdlora", "BdLoraConfig", blocks),
    )


CASES = [
    case("bdlora_parts", blocks={"target_modules_bd_a": ["self_attn"], "target_modules_bd_b": ["mlp"], "nblocks": 4}),
    case(
        "bdlora_some",
        r=6,
        blocks={"target_modules_bd_a": ["0.self_attn.q_proj"], "nblocks": 2, "match_strict": False},
        init_lora_weights=False,
    ),
    case(
        "bdlora_bias",
        "llama_bias",
        blocks={"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["o_proj", "down"], "nblocks": 2},
        lora_bias=True,
    ),
]
