"""VeLoRA: computes what LoRA does; only its gradients differ, see `tests/test_lora_variants.py`."""

from case import Case
from example import Example


def example(name, base="mlp", target=("lin0", "lin1"), groups=4, **config):
    config = {
        "r": 4,
        "lora_alpha": 6,
        "velora_config": {"num_groups": groups},
        **config,
        "target_modules": list(target),
    }
    drop = "lora_dropout" if config.get("lora_dropout") else ""
    return Example(name, base, config, dropout=drop, projected=True)


EXAMPLES = [
    example("velora"),
    example("velora_sequence", "sequence", groups=5),
    example("velora_many", groups=64),
    example("velora_bias", lora_bias=True),
    example("velora_dropout", lora_dropout=0.2),
    example("velora_transposed", "transposed", ["layer"], fan_in_fan_out=True),
]


def case(name, base="llama", settings=None, target=("q_proj", "down_proj"), **config):
    return Case(
        name,
        base,
        {"r": 4, "lora_alpha": 6, "target_modules": list(target), **config},
        variant=("velora_config", "VeloraConfig", settings or {}),
    )


CASES = [
    case("velora_padded", settings={"num_groups": 5, "scale": 2.0, "init_type": "batch_average_once"}, use_rslora=True),
    case("velora_default", "llama_bias", lora_bias=True),
    case("velora_gpt2", "gpt2", {"num_groups": 2}, ["c_attn"], fan_in_fan_out=True),
    case("velora_bf16", "llama_bf16", {"num_groups": 4}),
]
