"""aLoRA: LoRA from the last invocation sequence of a prompt on. What it does to tokens is in `tests/test_alora.py`."""

from case import Case
from example import Example

TOKENS = {"alora_invocation_tokens": [3, 3], "task_type": "CAUSAL_LM"}


def example(name, base="sequence", target=("lin0", "lin1"), **config):
    """An example whose three sequences of five tokens begin at their ends, in the middle and before the first."""
    drop = "lora_dropout" if config.get("lora_dropout") else ""
    config = {"r": 4, "lora_alpha": 6, "target_modules": list(target), **TOKENS, **config}
    near = 1e-5 if config.get("init_lora_weights") == "pissa" else 0.0
    return Example(name, base, config, identity=near, merges=False, dropout=drop, call={"alora_offsets": [1, 3, 9]})


EXAMPLES = [
    example("alora"),
    example("alora_dropout", lora_dropout=0.2),
    example("alora_bias", lora_bias=True),
    example("alora_transposed", "transposed", ["layer"], fan_in_fan_out=True),
    example("alora_pissa", init_lora_weights="pissa"),
]
QV = {"target_modules": ["q_proj", "v_proj"], **TOKENS}
CASES = [
    Case("alora_all", "llama", {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "use_rslora": True, **TOKENS}),
    Case("alora_offsets", "llama", {"r": 4, **QV}, call={"alora_offsets": [2, 30]}),
    Case(
        "alora_bias",
        "llama_bias",
        {"r": 2, "lora_bias": True, **QV},
        second={"r": 4, "alora_invocation_tokens": [17], "task_type": "CAUSAL_LM", "target_modules": ["o_proj"]},
    ),
    Case("alora_gpt2", "gpt2", {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, **TOKENS}),
]
