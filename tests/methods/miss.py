"""MiSS: a shared block added to slices of W, and its variants."""

import torch
from case import Case
from example import Example


def formula(config, tensors, weights, state):
    """Column j of W gets row j % r of the block; 'bat' works on each tile of W."""
    for key in [k for k in tensors if k.endswith(".miss_block")]:
        name = key.removesuffix(".miss_block") + ".weight"
        block, W = tensors[key], state[name]
        out, inp = W.shape
        new, r = W.clone(), config.r
        if config.init_weights == "bat":
            for o in range(out // r):
                for i in range(inp // r):
                    tile = W[o * r : (o + 1) * r, i * r : (i + 1) * r]
                    new[o * r : (o + 1) * r, i * r : (i + 1) * r] = tile + tile @ block[o] + block[o]
        else:
            for j in range(inp):
                column = block[j % r]
                new[:, j] += torch.cat([column] * (out // len(column)))
        state[name] = new


def example(name, base, target, **config):
    """An example with a small rank."""
    drop = "miss_dropout" if config.get("miss_dropout") else ""
    identity = None if config.get("init_weights") is False else 0.0
    return Example(name, base, {"r": 4, "target_modules": target, **config}, "MISS", oracle=formula, dropout=drop,
                   identity=identity)  # fmt: skip


EXAMPLES = [
    example("miss", "mlp", ["lin0", "lin1"]),
    example("miss_padded", "sequence", ["lin0", "lin1"], r=5),
    example("miss_mini", "mlp", ["lin0"], init_weights="mini", mini_r=6),
    example("miss_bat", "mlp", ["lin0"], init_weights="bat"),
    example("miss_bat_dropout", "sequence", ["lin0"], init_weights="bat", miss_dropout=0.2),
    example("miss_mini_padded", "sequence", ["lin0"], init_weights="mini", mini_r=4, r=5),
    example("miss_random", "mlp", ["lin0", "lin1"], init_weights=False),
    example("miss_dropout", "mlp", ["lin0", "lin1"], miss_dropout=0.2),
]
QV = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
CLASS = {"config_class": "MissConfig"}
CASES = [
    Case("miss", "llama", {**QV, "r": 4}, **CLASS),
    Case("miss_padded", "llama", {**QV, "r": 5}, **CLASS),
    Case("miss_mini", "llama", {**QV, "r": 4, "init_weights": "mini", "mini_r": 2}, **CLASS),
    Case("miss_bat", "llama", {**QV, "r": 4, "init_weights": "bat"}, **CLASS),
]
