"""Shadow; its laws are in tests/test_shadow.py, as it adapts whole blocks and runs a model beside them.

No case has a second adapter: upstream's does nothing if it was added before the first forward.
"""

from case import Case


def case(name, base, task="CAUSAL_LM", **options):
    """A case; options that are fields of the config are taken as such."""
    about = {k: options.pop(k) for k in ("tolerance", "needs") if k in options}
    config = {"r": 4, "shadow_alpha": 0.5, "task_type": task, **options}
    return Case(name, base, config, config_class="ShadowConfig", **about)


SMALL = {"shadow_hidden_size": 8, "shadow_num_attention_heads": 2, "shadow_intermediate_size": 12}
SINGLE = "single_transformer_blocks"
EXAMPLES = []


def flux2(name, base="flux2", **options):
    """A case on a diffusion model, which has no task."""
    return case(name, base, None, needs="diffusers", **options)


CASES = [
    case("shadow", "llama"),
    case("shadow_own_tokens", "llama", share_embeddings=False),
    case("shadow_small", "llama", shadow_num_hidden_layers=2, update_hidden_size=5, **SMALL),
    case("shadow_gpt2", "gpt2", target_modules=["h.0"], shadow_intermediate_size=10),
    case("shadow_classifier", "llama_classifier", "SEQ_CLS"),
    case("shadow_bert", "bert_classifier", "SEQ_CLS", target_modules=r"bert\.encoder\.layer\.\d+", **SMALL),
    case("shadow_bf16", "llama_bf16", tolerance=0.05),
    flux2("shadow_flux2"),
    flux2("shadow_flux2_own", share_embeddings=False, target_modules=[f"{SINGLE}.1", f"{SINGLE}.2"]),
    flux2("shadow_flux2_small", shadow_hidden_size=8, shadow_intermediate_size=13, update_hidden_size=5),
    flux2("shadow_flux2_bf16", "flux2_bf16", tolerance=0.05),
]
