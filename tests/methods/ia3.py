"""(IA)³: rows of W and b, or columns of W, times a trained factor."""

import torch
from case import Case
from example import Example


def formula(config, tensors, weights, state):
    """Adapters multiply what earlier ones made; a convolution's groups read channels of their own."""
    for key, factors in tensors.items():
        path = key.removesuffix(".ia3_l")
        name, factors = f"{path}.weight", factors.flatten()
        W = state[name].T if config.fan_in_fan_out else state[name]
        if path in config.feedforward_modules:
            group = torch.arange(W.shape[0]) // (W.shape[0] * W.shape[1] // len(factors))
            columns = factors.view(-1, W.shape[1])[group]
            W = W * columns.reshape(*columns.shape, *[1] * (W.ndim - 2))
        else:
            W = W * factors.reshape(-1, *[1] * (W.ndim - 1))
            if f"{path}.bias" in state:
                state[f"{path}.bias"] = state[f"{path}.bias"] * factors
        state[name] = W.T if config.fan_in_fan_out else W


def example(name, base, outputs, inputs, **config):
    """An example that scales the outputs of some layers and the inputs of others."""
    identity = config.pop("identity", 0.0)
    chosen = {"target_modules": [*outputs, *inputs], "feedforward_modules": inputs}
    return Example(name, base, {**chosen, **config}, "IA3", oracle=formula, identity=identity)


EXAMPLES = [
    example("ia3", "mlp", ["lin0"], ["lin1"]),
    example("ia3_sequence", "sequence", ["lin1"], ["lin0"]),
    example("ia3_no_bias", "no_bias", ["layer"], []),
    example("ia3_random", "mlp", ["lin0", "lin1"], [], init_ia3_weights=False, identity=None),
    example("ia3_transposed", "transposed", ["layer"], [], fan_in_fan_out=True),
    example("ia3_transposed_input", "transposed", [], ["layer"], fan_in_fan_out=True),
    example("ia3_conv1", "conv1", [], ["layer"]),
    example("ia3_conv2", "conv2", ["layer"], []),
    example("ia3_conv2_input", "reflect", [], ["layer"]),
    example("ia3_conv3", "conv3", ["layer"], []),
    example("ia3_conv3_input", "conv3", [], ["layer"]),
    example("ia3_grouped", "grouped", ["layer"], []),
    example("ia3_grouped_input", "grouped", [], ["layer"]),
]
SECOND = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"], "task_type": "CAUSAL_LM"}
CONV = {"target_modules": ["conv2", "conv3", "head"], "feedforward_modules": ["conv3"]}
CASES = [
    Case("ia3", "llama", {"task_type": "CAUSAL_LM"}, config_class="IA3Config", second=SECOND),
    Case("ia3_bias", "bert_classifier", {"task_type": "SEQ_CLS"}, config_class="IA3Config"),
    Case("ia3_gpt2", "gpt2", {}, config_class="IA3Config"),
    Case("ia3_random", "t5", {"init_ia3_weights": False, "task_type": "SEQ_2_SEQ_LM"}, config_class="IA3Config"),
    Case("ia3_conv", "convs", CONV, config_class="IA3Config"),
]
