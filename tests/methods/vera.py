"""VeRA: W + diag(b)·B·diag(d)·A."""

from case import Case
from example import Example

T = ["lin0", "lin1"]


def formula(config, tensors, weights, state):
    """The shared bases may be larger than the layer, which then uses their corner."""
    for key in [k for k in tensors if k.endswith(".vera_lambda_b")]:
        path = key.removesuffix(".vera_lambda_b")
        b, d = tensors[key], tensors[f"{path}.vera_lambda_d"]
        name = f"{path}.weight"
        W = weights[name].T if config.fan_in_fan_out else weights[name]
        A, B = tensors["vera_A"][:, : W.shape[1]], tensors["vera_B"][: W.shape[0]]
        delta = b[:, None] * B @ (d[:, None] * A)
        state[name] = state[name] + (delta.T if config.fan_in_fan_out else delta)


def example(name, base, target, **config):
    """An example with a small rank."""
    drop = "vera_dropout" if config.get("vera_dropout") else ""
    return Example(
        name, base, {"r": 6, "d_initial": 1.0, "target_modules": target, **config}, "VERA", oracle=formula, dropout=drop
    )


EXAMPLES = [
    example("vera", "mlp", T),
    example("vera_sequence", "sequence", T, d_initial=0.5),
    example("vera_transposed", "transposed", ["layer"], fan_in_fan_out=True),
    example("vera_dropout", "mlp", T, vera_dropout=0.2),
]
QV = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
CASES = [
    Case("vera", "llama", {"r": 8, **QV}, config_class="VeraConfig", second={"r": 8, "d_initial": 0.2, **QV}),
    Case(
        "vera_seed",
        "llama",
        {"r": 8, "save_projection": False, "projection_prng_key": 7, **QV},
        config_class="VeraConfig",
    ),
    Case(
        "vera_gpt2",
        "gpt2",
        {"r": 8, "target_modules": ["c_attn"], "fan_in_fan_out": True, "d_initial": 0.3},
        config_class="VeraConfig",
    ),
]
