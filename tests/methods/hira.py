"""HiRA: W + W∘(BA)."""

from case import Case
from example import Example

T = ["lin0", "lin1"]


def formula(config, tensors, weights, state):
    """Embeddings and Conv1D store Wᵀ; a convolution's A holds its kernel."""
    for key in [k for k in tensors if k.endswith("_A")]:
        path = key.rpartition(".hira_")[0]
        A, B, W = tensors[key], tensors[key.removesuffix("A") + "B"], weights[f"{path}.weight"]
        product = (B.flatten(1) @ A.flatten(1)).reshape(B.shape[0], *A.shape[1:])
        transposed = "embedding" in key or config.fan_in_fan_out
        state[f"{path}.weight"] = state[f"{path}.weight"] + W * (product.T if transposed else product)


def example(name, base, target, **config):
    """An example with a small rank."""
    options = {"r": 4, "target_modules": target, **config}
    about = {"dropout": "hira_dropout"} if "hira_dropout" in config else {}
    if config.get("init_weights", True) in (False, None):
        about["identity"] = None
    return Example(name, base, options, "HIRA", oracle=formula, **about)


EXAMPLES = [
    example("hira", "mlp", T),
    example("hira_sequence", "sequence", T, rank_pattern={"lin0": 6}),
    example("hira_no_bias", "no_bias", ["layer"], init_weights="gaussian"),
    example("hira_random", "mlp", T, init_weights=False),
    example("hira_dropout", "mlp", T, hira_dropout=0.2),
    example("hira_transposed", "transposed", ["layer"], fan_in_fan_out=True),
    example("hira_conv1", "conv1", ["layer"]),
    example("hira_conv2", "conv2", ["layer"], hira_dropout=0.2),
    example("hira_conv3", "conv3", ["layer"]),
    example("hira_reflect", "reflect", ["layer"]),
    example("hira_embedding", "embedded", ["emb"]),
    example("hira_embedding_random", "embedded", ["emb", "lin"], init_weights=False),
]


def case(name, base, target, second=None, **config):
    """A case with rank 4."""
    config = {"r": 4, "target_modules": target, **config}
    return Case(f"hira{name}", base, config, second=second, config_class="HiraConfig")


CASES = [
    case(
        "",
        "llama",
        ["q_proj", "v_proj", "down_proj"],
        task_type="CAUSAL_LM",
        second={"r": 2, "target_modules": ["k_proj"], "init_weights": False, "hira_dropout": 0.1},
    ),
    case("_gpt2", "gpt2", ["c_attn", "wte"], fan_in_fan_out=True, init_weights="gaussian"),
    case("_convs", "convs", ["conv1", "conv2", "conv3", "head"], init_weights=False),
    case("_embedding", "embedded", ["emb", "lin"]),
]
