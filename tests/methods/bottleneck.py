"""Bottleneck adapters: y + s·U f(D z). No weight does the same, so their formula is in tests/test_bottleneck.py."""

from example import Example


def example(name, base, target, **config):
    """An example; options that are fields of `Example` are taken as such."""
    fields = ("identity", "frozen", "tolerance", "half")
    about = {k: config.pop(k) for k in fields if k in config}
    if "dropout" in config:
        about["dropout"] = "dropout"
    config = {"bottleneck_size": 4, "target_modules": target, **config}
    return Example(f"bottleneck{name}", base, config, "BOTTLENECK", merges=False, **about)


BOTH, LAYER = ["lin0", "lin1"], ["layer"]
RANDOM = {"init_weights": False, "identity": None}
PHM = {"phm_dim": 2, "non_linearity": "gelu"}
EXAMPLES = [
    example("", "mlp", BOTH),
    example("_sequence", "sequence", BOTH, bottleneck_size=None, reduction_factor=4, size_pattern={"lin1": 3}),
    example("_parallel", "sequence", BOTH, variant="parallel"),
    example("_gated", "sequence", BOTH, variant="scaled_parallel", gating=True, **RANDOM),
    example("_channels", "mlp", BOTH, scaling="channel", non_linearity="tanh", norm_before=True),
    example("_norm_after", "sequence", BOTH, norm_after=True, non_linearity="gelu", half={"single": 0.06}),
    example("_norm_of_sum", "mlp", BOTH, norm_after=True, residual_before_norm=True, **RANDOM),
    example("_dropout", "mlp", BOTH, dropout=0.1),
    example("_near", "transposed", LAYER, init_weights="bert", identity=0.02),
    example("_renorm", "residual", ["after"], renorm=True),
    example("_tapped", "residual", ["lin0"], reads="both", tap_modules={"lin0": "before"}),
    example("_embedding", "embedded", ["emb", "lin"]),
    example("_nice", "embedded", ["lin"], invertible="nice", invertible_modules=["emb"]),
    example("_glow", "residual", ["lin0"], invertible="glow", invertible_modules=["before"], invertible_head=["lin1"]),
    example("_compacter", "residual", ["lin0", "after"], variant="compacter", **PHM),
    example("_full_terms", "sequence", ["lin0"], **PHM, phm_rank=0, phm_rule_rank=1, phm_shared_rule=False),
    example("_shared_terms", "mlp", ["lin0"], **PHM, phm_shared_weights=True, phm_bias=False, **RANDOM),
    example("_fixed_rule", "no_bias", LAYER, **PHM, phm_learn_rule=False, frozen=("bottleneck_rule",)),
]
CASES: list = []
