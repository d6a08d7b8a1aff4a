"""DeLoRA: W plus normalised directions of rank one, scaled by λ/r and the lengths of W's columns."""

import torch
from case import Case
from example import Example

T = ["lin0", "lin1"]


def formula(config, tensors, weights, state):
    """A sum over the directions, as the paper writes it; the lengths are those of the base weight."""
    for path in [k.removesuffix(".delora_A") for k in tensors if k.endswith(".delora_A")]:
        A, B, bound = (tensors[f"{path}.delora_{name}"] for name in ("A", "B", "lambda"))
        stored = weights[f"{path}.weight"]
        W = stored if stored.shape == (B.shape[0], A.shape[1]) else stored.T
        assert torch.allclose(tensors[f"{path}.delora_w_norm"], W.norm(dim=0))
        delta = sum(torch.outer(b / b.norm(), a / a.norm()) for a, b in zip(A, B.T)) * bound / len(A) * W.norm(dim=0)
        state[f"{path}.weight"] = state[f"{path}.weight"] + (delta if W is stored else delta.T)


def example(name, base, target, **config):
    """An example with three directions."""
    about = {"identity": None} if config.get("init_weights") is False else {}
    about |= {"dropout": "module_dropout"} if "module_dropout" in config else {}
    options = {"r": 3, "delora_lambda": 2, "target_modules": target, **config}
    return Example(name, base, options, "DELORA", oracle=formula, **about)


EXAMPLES = [
    example("delora", "mlp", T),
    example("delora_sequence", "sequence", T, rank_pattern={"lin0": 2}, lambda_pattern={"lin1": 3.5}),
    example("delora_no_bias", "no_bias", ["layer"], init_weights=False),
    example("delora_dropout", "mlp", T, module_dropout=0.2),
    example("delora_transposed", "transposed", ["layer"]),
]


def case(name, base="llama", target=("q_proj", "v_proj", "down_proj"), second=None, **config):
    """A case with three directions."""
    config = {"r": 3, "target_modules": list(target), **config}
    return Case(f"delora{name}", base, config, second=second, config_class="DeloraConfig")


CASES = [
    case("", task_type="CAUSAL_LM", second={"r": 2, "target_modules": ["k_proj"], "init_weights": False}),
    case("_patterns", rank_pattern={"q_proj": 2}, lambda_pattern={"1.mlp.down_proj": 3}, module_dropout=0.1),
    case("_bias", "llama_bias", ["q_proj", "gate_proj"], bias="delora_only", delora_lambda=4, init_weights=False),
]
