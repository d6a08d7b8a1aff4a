"""LN tuning: trained copies of whole modules."""

from case import Case
from example import BASES, Example, Wrap
from models import WIDTH, noise
from torch import nn


class RMSNorm(nn.Module):
    """A norm that is no class of torch."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(noise((WIDTH,), 3))

    def forward(self, x):
        return self.weight * (x.float() / x.float().square().mean(-1, keepdim=True).add(1e-6).sqrt()).to(x.dtype)


X = noise((3, 5, WIDTH), 7)
BASES["linears"] = BASES["mlp"]  # a base of its own: modules that act whole are not folded
BASES["layer_norm"] = lambda: Wrap(nn.LayerNorm(WIDTH)), X
BASES["rms_norm"] = lambda: Wrap(RMSNorm()), X
BASES["block"] = lambda: Wrap(nn.Sequential(nn.Linear(WIDTH, 8), nn.LayerNorm(8), nn.Linear(8, 4))), X
BASES["batch_norm"] = lambda: Wrap(nn.BatchNorm1d(5)), X


def formula(config, tensors, weights, state):
    """The file's tensors are the base's."""
    for key, value in tensors.items():
        key = key.replace("ln_tuning_layers.default.", "ln_tuning_layers.").replace(
            "ln_tuning_layers.second.", "ln_tuning_layers."
        )
        state[key.replace(".ln_tuning_layers.", ".")] = value


def example(name, base, target):
    """Only one adapter acts, and in the base's own dtype."""
    return Example(name, base, {"target_modules": target}, "LN_TUNING", oracle=formula, several=False, casts=False)


EXAMPLES = [
    example("ln_tuning", "layer_norm", ["layer"]),
    example("ln_tuning_rms", "rms_norm", ["layer"]),
    example("ln_tuning_linear", "linears", ["lin0", "lin1"]),
    example("ln_tuning_embedding", "embedded", ["emb", "lin"]),
    example("ln_tuning_conv", "conv2", ["layer"]),
    example("ln_tuning_block", "block", ["layer"]),
    example("ln_tuning_buffers", "batch_norm", ["layer"]),
]
NORMS = {"target_modules": ["LayerNorm"], "exclude_modules": ["embeddings.LayerNorm"], "task_type": "SEQ_CLS"}
CASES = [
    Case(
        "ln_tuning",
        "llama",
        {"task_type": "CAUSAL_LM"},
        config_class="LNTuningConfig",
        second={},
    ),
    Case("ln_tuning_gpt2", "gpt2", {}, config_class="LNTuningConfig"),
    Case("ln_tuning_bert", "bert_classifier", NORMS, config_class="LNTuningConfig"),
    Case("ln_tuning_whole", "embedded", {"target_modules": ["emb", "lin"]}, config_class="LNTuningConfig"),
    Case("ln_tuning_block", "llama", {"target_modules": ["mlp"]}, config_class="LNTuningConfig"),
    Case("ln_tuning_bf16", "llama_bf16", {}, config_class="LNTuningConfig", tolerance=0.02),
]
