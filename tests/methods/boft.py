"""BOFT: the input rotated by butterfly factors, the output scaled."""

import torch
from case import Case
from example import Example

T = ["lin0", "lin1"]


def rotation(R):
    """The matrix M with y = s∘W(x M): factor i joins inputs whose numbers differ in one digit."""
    factors, blocks, b, _ = R.shape
    n, half = blocks * b, b // 2
    M = torch.eye(n, dtype=R.dtype)
    for i in range(factors):
        B = torch.zeros(n, n, dtype=R.dtype)
        for k in range(blocks):
            Q = (R[i, k] - R[i, k].T) / 2
            eye = torch.eye(b, dtype=R.dtype)
            group, j = divmod(k, 2**i)
            start = group * b * 2**i + j * half
            if i:
                members = [*range(start, start + half), *range(start + half * 2**i, start + half * 2**i + half)]
            else:
                members = list(range(k * b, k * b + b))
            index = torch.tensor(members)
            B[index[:, None], index] = (eye - Q) @ torch.linalg.inv(eye + Q)
        M = B @ M
    return M


def formula(config, tensors, weights, state):
    for key in [k for k in tensors if k.endswith("boft_R")]:
        path = key.removesuffix(".boft_R")
        W, s = state[f"{path}.weight"], tensors[f"{path}.boft_s"].flatten()
        transposed = config.fan_in_fan_out
        flat = W.T if transposed else W.flatten(1)
        new = s[:, None] * (flat @ rotation(tensors[key]).T)
        state[f"{path}.weight"] = new.T if transposed else new.reshape(W.shape)


def example(name, base, target, *, dropout="", identity=0.0, tolerance=2e-6, **config):
    return Example(
        f"boft{name}",
        base,
        {"target_modules": target, **config},
        "BOFT",
        oracle=formula,
        dropout=dropout,
        identity=identity,
        tolerance=tolerance,
    )


EXAMPLES = [
    example("", "mlp", T),
    example("_sequence", "sequence", T, boft_block_size=2, boft_n_butterfly_factor=3),
    example("_no_bias", "no_bias", ["layer"], boft_n_butterfly_factor=2),
    example("_count", "mlp", T, boft_block_size=0, boft_block_num=2),
    example("_random", "mlp", T, init_weights=False, identity=None),
    example("_transposed", "transposed", ["layer"], boft_n_butterfly_factor=2, fan_in_fan_out=True),
    example("_conv", "conv2", ["layer"], identity=1e-6),
    example("_conv_pointwise", "pointwise", ["layer"], boft_block_size=2, boft_n_butterfly_factor=2),
    example("_conv_circular", "circular", ["layer"], boft_block_size=2, boft_n_butterfly_factor=2, identity=1e-6),
    example("_dropout", "mlp", T, boft_block_size=2, boft_dropout=0.2, dropout="boft_dropout"),
]
QV = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def case(name, base="llama", second=None, **config):
    config = config if "target_modules" in config else {**config, **QV}
    served = "upstream makes one factor where its CUDA kernel is missing" if "boft_n_butterfly_factor" in config else ""
    return Case(name, base, config, second=second, config_class="BOFTConfig", served=served)


CASES = [
    case("boft", second={"boft_block_size": 0, "boft_block_num": 2, **QV}),
    case("boft_biased", "llama_bias", boft_block_size=2, bias="boft_only"),
    case("boft_one_factor", boft_block_size=2, boft_n_butterfly_factor=2),
    case("boft_conv", "convs", boft_block_size=3, target_modules=["conv2", "head"]),
]
