"""BEFT: b + δ."""

from case import Case
from example import Example


def formula(config, tensors, weights, state):
    """Layers without a bias get one."""
    for key, bias in tensors.items():
        name = f"{key.removesuffix('.beft_bias')}.bias"
        state[name] = state[name] + bias.flatten()


def example(name, base, target, **about):
    """An example; `random` for a start at random."""
    random = about.pop("random", False)
    config = {"target_modules": target, "init_weights": not random}
    return Example(name, base, config, "BEFT", oracle=formula, identity=None if random else 0.0, **about)


EXAMPLES = [
    example("beft", "mlp", ["lin0", "lin1"]),
    example("beft_sequence", "sequence", ["lin0"]),
    example("beft_no_bias", "no_bias", ["layer"], adds_bias=True),
    example("beft_random", "mlp", ["lin0", "lin1"], random=True),
    example("beft_transposed", "transposed", ["layer"]),
    example("beft_conv1", "conv1", ["layer"]),
    example("beft_conv2", "conv2", ["layer"]),
    example("beft_conv3", "conv3", ["layer"]),
]
V = {"target_modules": ["v_proj", "o_proj"], "task_type": "CAUSAL_LM"}
CASES = [
    Case("beft", "llama", {"task_type": "CAUSAL_LM"}, config_class="BeftConfig", second=V),
    Case("beft_bias", "llama_bias", {**V, "init_weights": False}, config_class="BeftConfig"),
    Case("beft_bert", "bert_classifier", {"task_type": "SEQ_CLS"}, config_class="BeftConfig"),
]
