"""DEFT: W + Q(s·R - PᵀW)."""

import torch
from case import Case
from example import Example

T = ["lin0", "lin1"]


def formula(config, tensors, weights, state):
    """W' = (I - QPᵀ)W + s·QR; P and Q are relu(P) and P, or both P made orthonormal."""
    for key in [k for k in tensors if k.endswith("deft_P")]:
        path, Q = key.removesuffix(".deft_P"), tensors[key]
        P = Q.clamp(min=0)
        if config.decomposition_method == "qr":
            P = Q = torch.linalg.qr(Q)[0]
        name = f"{path}.weight"
        W = weights[name].T if config.fan_in_fan_out else weights[name]
        delta = -Q @ P.T @ W
        if not config.para:
            scale = config.alpha / Q.shape[1] if config.alpha else 1
            delta = delta + scale * Q @ tensors[f"{path}.deft_R"]
        state[name] = state[name] + (delta.T if config.fan_in_fan_out else delta)


def example(name, base, target, **config):
    """An example of rank 4 that starts near the base, or does not."""
    starts = 2e-6 if config.get("init_weights", True) else None
    starts = 0.02 if config.get("para") else starts  # P is small, and only its square takes effect
    about = {"dropout": "deft_dropout"} if "deft_dropout" in config else {}
    return Example(
        name,
        base,
        {"r": 4, "target_modules": target, **config},
        "DEFT",
        identity=starts,
        oracle=formula,
        **about,
    )


EXAMPLES = [
    example("deft", "mlp", T),
    example("deft_qr", "mlp", T, decomposition_method="qr"),
    example("deft_sequence", "sequence", T, alpha=6, decomposition_method="qr"),
    example("deft_no_bias", "no_bias", ["layer"], init_weights=False, init_scale=30.0, decomposition_method="qr"),
    example("deft_para", "mlp", T, para=True),
    example("deft_dropout", "mlp", T, deft_dropout=0.2),
    example("deft_transposed", "transposed", ["layer"], fan_in_fan_out=True, alpha=8),
]


def case(name, base="llama", target=("q_proj", "v_proj", "down_proj"), **config):
    """A case of rank 4."""
    return Case(f"deft{name}", base, {"r": 4, "target_modules": list(target), **config}, config_class="DeftConfig")


CASES = [
    case("", task_type="CAUSAL_LM"),
    case("_qr", target=["k_proj", "up_proj"], decomposition_method="qr", alpha=6, deft_dropout=0.1),
    case("_para", para=True, decomposition_method="qr", target=["v_proj"]),
    case("_bias", "llama_bias", ["q_proj", "gate_proj"], bias="deft_only", init_weights=False, init_scale=2.0),
    case("_gpt2", "gpt2", ["c_attn"], fan_in_fan_out=True),
    case("_wide", "mlp", ["lin1"], r=20),
]
