"""PVeRA: W + diag(b)·B·diag(d)·A with the first half of A and d, in evaluation and merged; random in training."""

from case import Case
from example import Example

T = ["lin0", "lin1"]


def formula(config, tensors, weights, state):
    """The mean of what is drawn in training."""
    for key in [k for k in tensors if k.endswith(".pvera_lambda_b")]:
        path = key.removesuffix(".pvera_lambda_b")
        b, d = tensors[key], tensors[f"{path}.pvera_lambda_d"]
        name = f"{path}.weight"
        W = weights[name].T if config.fan_in_fan_out else weights[name]
        A, B = tensors["pvera_A"][:, : W.shape[1]], tensors["pvera_B"][: W.shape[0]]
        delta = b[:, None] * B @ (d[:, None] * A)[: config.r]
        state[name] = state[name] + (delta.T if config.fan_in_fan_out else delta)


def example(name, base, target, **config):
    """An example with a small rank; its training is random with or without dropout."""
    config = {"r": 6, "d_initial": 1.0, "target_modules": target, **config}
    return Example(name, base, config, "PVERA", oracle=formula, dropout="pvera_dropout")


EXAMPLES = [
    example("pvera", "mlp", T),
    example("pvera_sequence", "sequence", T, d_initial=0.5),
    example("pvera_transposed", "transposed", ["layer"], fan_in_fan_out=True),
    example("pvera_dropout", "mlp", T, pvera_dropout=0.2),
]
QV = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
CLASS = {"config_class": "PveraConfig"}
CASES = [
    Case("pvera", "llama", {"r": 8, **QV}, second={"r": 8, "d_initial": 0.2, **QV}, **CLASS),
    Case("pvera_seed", "llama", {"r": 8, "save_projection": False, "projection_prng_key": 7, **QV}, **CLASS),
    Case(
        "pvera_gpt2", "gpt2", {"r": 8, "target_modules": ["c_attn"], "fan_in_fan_out": True, "d_initial": 0.3}, **CLASS
    ),
]
