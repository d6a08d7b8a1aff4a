"""AdaMSS: W and its bias, clustered by rows, each cluster with an update B·A·V; schedules are in `test_adamss.py`."""

import torch
from case import Case
from example import Example

T = ["lin0", "lin1"]


def formula(config, tensors, weights, state):
    """Which rows a cluster has is no part of a file: it is asked of a layer made for these weights."""
    import peft

    for path in sorted({k.partition(".adamss_")[0] for k in tensors}):
        W, bias = weights[f"{path}.weight"], weights.get(f"{path}.bias")
        layer = torch.nn.Linear(W.shape[1], W.shape[0], bias=bias is not None)
        layer.load_state_dict({"weight": W} | ({} if bias is None else {"bias": bias}))
        options = {"r": config.r, "num_subspaces": config.num_subspaces, "random_seed": config.random_seed}
        other = peft.get_peft_model(torch.nn.Sequential(layer), peft.AdamssConfig(target_modules=["0"], **options))
        order = other.base_model.layers["0"].adapters["default"].adamss_rows.argsort()
        V, delta, done = tensors[f"{path}.adamss_newB"], torch.zeros_like(W), 0
        extra, i = torch.zeros(len(W), dtype=W.dtype), 0
        while f"{path}.adamss_A.{i}" in tensors:
            A, B = tensors[f"{path}.adamss_A.{i}"], tensors[f"{path}.adamss_B.{i}"]
            rows = order[done : done + len(B)]
            update = B @ A @ V
            delta[rows], done, i = update[:, : W.shape[1]], done + len(B), i + 1
            if bias is not None:
                extra[rows] = update[:, -1]
        assert done == len(W) and i == min(config.num_subspaces, len(W))
        state[f"{path}.weight"] = state[f"{path}.weight"] + delta
        if bias is not None:
            state[f"{path}.bias"] = state[f"{path}.bias"] + extra


def example(name, base, target, identity=0.0, **config):
    """An example with few singular vectors."""
    config = {"r": 4, "num_subspaces": 3, "subspace_rank": 2, "target_modules": target, **config}
    return Example(name, base, config, "ADAMSS", identity, oracle=formula)


EXAMPLES = [
    example("adamss", "mlp", T),
    example("adamss_sequence", "sequence", T, num_subspaces=2, subspace_rank=1),
    example("adamss_no_bias", "no_bias", ["layer"], num_subspaces=4, subspace_rank=3),
    example("adamss_dynamic", "mlp", T, use_dynamic_rank=True, svd_threshold=0.4, subspace_rank=4),
    example("adamss_random", "mlp", T, identity=0.1, init_weights=None),
]


def case(name, base, second=None, **config):
    """A case."""
    config = {"num_subspaces": 3, "subspace_rank": 2, **config}
    return Case(name, base, config, None if second is None else {**config, **second}, config_class="AdamssConfig")


QV = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
CASES = [
    case("adamss", "llama", second={"random_seed": 3, "num_subspaces": 2, "r": 3}, r=4, **QV),
    case("adamss_bias", "llama_bias", r=6, use_dynamic_rank=True, svd_threshold=0.3, subspace_rank=3, **QV),
    case("adamss_full_rank", "llama", target_modules=["q_proj"], init_weights=None),
    case("adamss_asa", "mlp", r=4, target_modules=["lin0", "lin1"], use_asa=True, asa_target_subspaces=4),
]
