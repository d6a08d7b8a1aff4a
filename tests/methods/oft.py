"""OFT: the input rotated in blocks."""

import torch
from case import Case
from example import Example

T = ["lin0", "lin1"]


def rotation(config, v, width):
    """The block-diagonal matrix M with y = (x M) Wᵀ."""
    count = width // config.oft_block_size if config.oft_block_size else config.r
    b = width // count
    row, column = torch.triu_indices(b, b, 1)
    blocks = []
    for values in v if len(v) > 1 else v.expand(count, -1):
        Q = torch.zeros(b, b, dtype=v.dtype)
        Q[row, column] = values
        Q = Q - Q.T
        eye = torch.eye(b, dtype=v.dtype)
        if config.use_cayley_neumann:
            n = config.num_cayley_neumann_terms
            factors = [1, 2] if n == 2 else [1, *[2] * (max(n, 4) - 2), 1]
            blocks.append(sum(f * torch.linalg.matrix_power(Q, i) for i, f in enumerate(factors)))
        else:
            blocks.append((eye - Q) @ torch.linalg.inv(eye + Q))
    return torch.block_diag(*blocks)


def formula(config, tensors, weights, state):
    for key in [k for k in tensors if k.endswith("R.weight")]:
        path, embedding = key.rpartition(".oft_")[0], "embedding" in key
        W = state[f"{path}.weight"]
        transposed = config.fan_in_fan_out
        flat = W.T if transposed else W.flatten(1)
        M = rotation(config, tensors[key], flat.shape[1])
        new = flat @ (M if embedding else M.T)
        state[f"{path}.weight"] = new.T if transposed else new.reshape(W.shape)


def example(name, base, target, *, dropout="", identity=0.0, half=None, **config):
    return Example(
        f"oft{name}",
        base,
        {"target_modules": target, "oft_block_size": 4, **config},
        "OFT",
        oracle=formula,
        dropout=dropout,
        identity=identity,
        half=half or {},
    )


EXAMPLES = [
    example("", "mlp", T),
    example("_sequence", "sequence", T, oft_block_size=8),
    example("_no_bias", "no_bias", ["layer"]),
    example("_exact", "mlp", T, use_cayley_neumann=False),
    example("_count", "mlp", T, oft_block_size=0, r=2),
    example("_shared", "mlp", T, block_share=True),
    example("_terms", "mlp", T, num_cayley_neumann_terms=3),
    example("_two_terms", "mlp", T, num_cayley_neumann_terms=2),
    example("_coft", "mlp", T, coft=True, eps=5.0),
    example("_random", "mlp", T, init_weights=False, identity=None),
    example("_transposed", "transposed", ["layer"], fan_in_fan_out=True),
    example("_embedding", "embedded", ["emb", "lin"]),
    example("_conv", "conv2", ["layer"], identity=1e-6),
    example("_conv_pointwise", "pointwise", ["layer"], oft_block_size=2),
    example("_conv_dilated", "dilated", ["layer"], identity=1e-6),
    example("_conv_circular", "circular", ["layer"], identity=1e-6, use_cayley_neumann=False),
    example("_dropout", "mlp", T, oft_block_size=2, module_dropout=0.1, dropout="module_dropout"),
]
QV = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def case(name, base="llama", second=None, **config):
    config = config if "target_modules" in config else {**config, **QV}
    return Case(name, base, config, second=second, config_class="OFTConfig")


CASES = [
    case("oft", oft_block_size=8, second={"r": 2, "oft_block_size": 0, **QV}),
    case("oft_exact", oft_block_size=4, use_cayley_neumann=False, bias="oft_only"),
    case("oft_shared", oft_block_size=5, block_share=True, num_cayley_neumann_terms=3),
    case("oft_coft", oft_block_size=8, coft=True, eps=0.5),
    case("oft_embedding", "embedded", oft_block_size=4, target_modules=["emb", "lin"]),
]
