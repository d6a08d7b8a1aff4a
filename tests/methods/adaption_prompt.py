"""Adaption prompt; its laws are in tests/test_adaption_prompt.py, as it adapts whole attention modules.

Live names end in the adapter's name, as everywhere; upstream's do not, as it keeps inactive adapters off the model.
"""

from case import Case


def case(name, base, adapter_len=4, adapter_layers=2, **options):
    """A case for a language model."""
    config = {"adapter_len": adapter_len, "adapter_layers": adapter_layers, "task_type": "CAUSAL_LM"}
    return Case(name, base, config, config_class="AdaptionPromptConfig", names=False, **options)


SECOND = {"adapter_len": 3, "adapter_layers": 1, "task_type": "CAUSAL_LM"}
EXAMPLES = []
CASES = [
    case("adaption_prompt", "llama", second=SECOND),
    case("adaption_prompt_mistral", "mistral", adapter_layers=1),
    case("adaption_prompt_gpt2", "gpt2", adapter_len=5, second=SECOND),
    case("adaption_prompt_bf16", "llama_bf16", tolerance=0.02),
]
