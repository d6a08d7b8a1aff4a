"""AdaLoRA: W + s·B·diag(E)·A with a budget of ranks; the budget itself is tested in `test_adalora.py`."""

from case import Case
from example import Example

T = ["lin0", "lin1"]
PLAN = {"total_step": 20, "init_r": 4, "target_r": 2}


def formula(config, tensors, weights, state):
    """The scaling stays that of the initial rank."""
    for key in [k for k in tensors if k.endswith(".lora_E")]:
        path = key.removesuffix(".lora_E")
        A, B, name = tensors[f"{path}.lora_A"], tensors[f"{path}.lora_B"], f"{path}.weight"
        delta = config.lora_alpha / (config.init_r + 1e-5) * (B @ (tensors[key] * A))
        state[name] = state[name] + (delta.T if config.fan_in_fan_out else delta.view(weights[name].shape))


def example(name, base, target, identity=0.0, **config):
    """An example; only one adapter of a model may be trained, so the second is made for inference."""
    drop = "lora_dropout" if config.get("lora_dropout") else ""
    config = {"lora_alpha": 12, "target_modules": target, **PLAN, **config}
    second = {"inference_mode": True}
    return Example(name, base, config, "ADALORA", identity, oracle=formula, dropout=drop, second=second)


PATTERN = {"lin0.lora_E": [True, False, True, True], "lin1.lora_E": [False, False, True, False]}
EXAMPLES = [
    example("adalora", "mlp", T),
    example("adalora_sequence", "sequence", T, lora_alpha=4),
    example("adalora_random", "mlp", T, identity=None, init_lora_weights=False),
    example("adalora_transposed", "transposed", ["layer"], fan_in_fan_out=True),
    example("adalora_conv", "conv2", ["layer"]),
    example("adalora_conv_dropout", "conv2", ["layer"], lora_dropout=0.2),
    example("adalora_dropout", "mlp", T, lora_dropout=0.2),
]
QV = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM", **PLAN}
KEPT = {
    f"model.layers.{i}.{module}.lora_E": [i == 0, True, j != 0, j == 2]
    for i in range(2)
    for j, module in enumerate(("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"))
}


def case(name, base, **config):
    """A case."""
    return Case(name, base, config, config_class="AdaLoraConfig")


CASES = [
    Case("adalora", "llama", {"lora_alpha": 12, **QV}, {"inference_mode": True, **QV}, config_class="AdaLoraConfig"),
    case("adalora_cut", "llama", rank_pattern=KEPT, lora_alpha=12, init_lora_weights=False, **QV),
    case("adalora_gpt2", "gpt2", target_modules=["c_attn"], fan_in_fan_out=True, lora_alpha=12, **PLAN),
    case("adalora_conv", "convs", target_modules=["conv2", "head"], lora_alpha=24, **PLAN),
]
