"""MonteCLoRA: computes what LoRA does outside training; what it draws is in `tests/test_lora_variants.py`."""

from case import Case
from example import Example


def example(name, base="mlp", target=("lin0", "lin1"), settings=None, **config):
    settings = {"num_samples": 3, **(settings or {})}
    config = {"r": 4, "lora_alpha": 6, "target_modules": list(target), "monteclora_config": settings, **config}
    drop = "lora_dropout" if config.get("lora_dropout") else ""
    return Example(name, base, config, dropout=drop, projected=True)


EXAMPLES = [
    example("monteclora"),
    example("monteclora_sequence", "sequence"),
    example("monteclora_bias", lora_bias=True),
    example("monteclora_dropout", lora_dropout=0.2),
    example("monteclora_transposed", "transposed", ["layer"], fan_in_fan_out=True),
]


def case(name, base="llama", settings=None, target=("q_proj", "down_proj"), **config):
    return Case(
        name,
        base,
        {"r": 4, "lora_alpha": 6, "target_modules": list(target), **config},
        variant=("monteclora_config", "MontecloraConfig", settings or {}),
    )


CASES = [
    case("monteclora_default", "llama_bias", lora_bias=True),
    case("monteclora_entropy", settings={"num_samples": 3, "use_entropy": True, "sample_scaler": 0.1}, use_rslora=True),
    case("monteclora_gpt2", "gpt2", {"num_samples": 2}, ["c_attn"], fan_in_fan_out=True),
]
