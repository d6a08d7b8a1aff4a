"""FRoD: U (S + diag ℓ) Vᵀ in W's place, where U follows from W and the V that all layers of a role share."""

import torch
from case import Case
from example import Example

T = ["lin0"]
# A role with fewer rows than columns: U's columns beside W's row space are the direction of rounding errors in W V⁻ᵀ,
# other ones for a base in another dtype.
WIDE = {"half": {"single": 2.0}}


def formula(config, tensors, weights, state):
    """U has columns of length 1 and solves U diag(first ℓ) Vᵀ = W."""
    for key in [k for k in tensors if k.endswith(".frod_lambda_l")]:
        path = key.removesuffix(".frod_lambda_l")
        name, role = f"{path}.weight", path.replace(".", "_")
        W = weights[name].T if config.fan_in_fan_out else weights[name]
        V, (row, column) = tensors[f"frod_V.{role}"], tensors[f"frod_s_indices.{role}"]
        U = W @ torch.linalg.inv(V).T
        U = U / U.norm(dim=0)
        M = torch.diag(tensors[key])
        M[row, column] = tensors[f"{path}.frod_lambda_s_values"]
        new = U @ M @ V.T
        state[name] = state[name] + (new - W).T if config.fan_in_fan_out else state[name] + new - W


def example(name, base, target, identity=1e-5, about=None, **config):
    """An example with many entries in S. What is made of U and V is as near to the base as float32 allows."""
    drop = "frod_dropout" if config.get("frod_dropout") else ""
    config = {"sparse_rate": 0.1, "target_modules": target, **config}
    return Example(name, base, config, "FROD", identity, tolerance=1e-5, oracle=formula, dropout=drop, **(about or {}))


EXAMPLES = [
    example("frod", "mlp", T),
    example("frod_sequence", "sequence", T, sparse_rate=0.02),
    example("frod_wide", "mlp", ["lin0", "lin1"], about=WIDE),
    example("frod_no_bias", "no_bias", ["layer"], about=WIDE),
    example("frod_transposed", "transposed", ["layer"], about=WIDE, fan_in_fan_out=True),
    example("frod_random", "mlp", T, identity=None, init_weights=False),
    example("frod_dropout", "mlp", T, frod_dropout=0.2),
]


def case(name, base, second=None, **config):
    """A case."""
    config = {"sparse_rate": 0.05, "progressbar": False, **config}
    return Case(name, base, config, None if second is None else {**config, **second}, config_class="FrodConfig")


QV = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
CASES = [
    case("frod", "llama", **QV),
    case("frod_seed", "llama", second={"frod_dropout": 0.1}, save_projection=False, projection_prng_key=5, **QV),
    case("frod_gpt2", "gpt2", target_modules=["c_attn"], fan_in_fan_out=True),
    case(
        "frod_bert", "bert_classifier", target_modules=["query", "output.dense"], task_type="SEQ_CLS", bias="frod_only"
    ),
]
