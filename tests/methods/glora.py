"""GLoRA: W∘(1 + A) + B, and b∘(1 + D) + E + W C."""

import torch
from case import Case
from example import Example

T = ["lin0", "lin1"]


def term(tensors, path):
    """A to E as a file has them: factors, a tensor, or zeros."""
    if f"{path}.Xd" in tensors:
        return tensors[f"{path}.Xd"] @ tensors[f"{path}.Xu"]
    return tensors.get(f"{path}.X", tensors.get(f"{path}.zeros"))


def formula(config, tensors, weights, state):
    """The paper's formula, with WC added to the bias."""
    for path in {k.rpartition(".glora_")[0] for k in tensors}:
        A, B, C, D, E = (term(tensors, f"{path}.glora_{name}") for name in "ABCDE")
        stored = weights[f"{path}.weight"]
        out = weights[f"{path}.bias"].shape[0] if f"{path}.bias" in weights else stored.shape[0]
        transposed = stored.shape[0] != out
        W = stored.T if transposed else stored
        delta = W * A + B
        state[f"{path}.weight"] = state[f"{path}.weight"] + (delta.T if transposed else delta)
        if f"{path}.bias" in weights:
            b = weights[f"{path}.bias"]
            state[f"{path}.bias"] = state[f"{path}.bias"] + b * D + E + torch.flatten(W @ C)


def example(name, base, target, **config):
    """An example with a small rank."""
    about = {"identity": None} if config.get("init_weights") is False else {}
    return Example(name, base, {"r": 3, "target_modules": target, **config}, "GLORA", oracle=formula, **about)


EXAMPLES = [
    example("glora", "mlp", T),
    example("glora_sequence", "sequence", T, config_C="vector", config_D_E="vector", init_weights=False),
    example("glora_vectors", "sequence", T, config_A_B="vector", config_C="vector", config_D_E="vector"),
    example("glora_numbers", "mlp", T, config_A_B="constant", config_C="none", init_weights=False),
    example("glora_weight_only", "mlp", T, config_A_B="vector", config_C="none", config_D_E="none"),
    example("glora_bias_only", "mlp", T, config_A_B="none"),
    example("glora_no_bias", "no_bias", ["layer"]),
    example("glora_no_bias_vectors", "no_bias", ["layer"], config_A_B="vector"),
    example("glora_transposed", "transposed", ["layer"]),
]


def case(name, base="llama", target=("q_proj", "down_proj"), second=None, **config):
    """A case of rank 3."""
    config = {"r": 3, "target_modules": list(target), **config}
    return Case(f"glora{name}", base, config, second=second, config_class="GloraConfig")


CASES = [
    case("", task_type="CAUSAL_LM", second={"r": 2, "target_modules": ["q_proj"], "config_A_B": "constant"}),
    case("_biases", "llama_bias", bias="glora_only", config_C="vector", config_D_E="vector", init_weights=False),
    case("_vectors", "llama_bias", ["v_proj"], config_A_B="vector", config_C="none", init_weights=False),
    case("_bias_only", "mlp", ["lin0", "lin1"], config_A_B="none"),
    case("_numbers", "mlp", ["lin1"], config_A_B="constant", config_C="vector", config_D_E="none"),
]
