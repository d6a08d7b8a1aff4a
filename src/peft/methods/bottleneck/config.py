"""The config of bottleneck adapters, and what the papers call by a name."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from peft.config import TargetConfig
from peft.core.validate import check_pattern, check_range
from peft.enums import PeftType
from peft.errors import ConfigError
from peft.ops.bottleneck import ACTIVATIONS

COMPACTER = {"reduction_factor": 32.0, "non_linearity": "gelu", "phm_dim": 4}
VARIANTS: dict[str, dict] = {  # name: the fields that it sets where a config leaves them open
    "houlsby": {"non_linearity": "swish"},  # after attention and after the feed-forward, arXiv 1902.00751
    "pfeiffer": {},  # after the feed-forward's residual connection and norm, arXiv 2005.00247
    "parallel": {"reduction_factor": 2.0, "reads": "input", "scaling": 4.0},  # beside the feed-forward, 2110.04366
    "scaled_parallel": {"reduction_factor": 2.0, "reads": "input", "scaling": "learned"},
    "compacter": COMPACTER,  # hypercomplex, where houlsby's are, arXiv 2106.04647
    "compacter++": COMPACTER,  # hypercomplex, where pfeiffer's are
}
OTHERWISE = {"reduction_factor": 16.0, "non_linearity": "relu", "reads": "output", "scaling": 1.0, "phm_dim": 0}


@dataclass
class BottleneckConfig(TargetConfig):
    """Bottleneck adapters on linear layers, norms and whole blocks. Wrong values raise ConfigError, naming the field.

    target_modules=None: where the variant's paper has them, for the model types in `core/defaults.py`.
    """

    METHOD: ClassVar = PeftType.BOTTLENECK

    variant: Literal["houlsby", "pfeiffer", "parallel", "scaled_parallel", "compacter", "compacter++"] = field(
        default="houlsby", metadata={"help": "where adapters sit, and what the fields left None become"}
    )
    reduction_factor: float | None = field(
        default=None, metadata={"help": "width of the layer's output / width of the bottleneck"}
    )
    bottleneck_size: int | None = field(
        default=None, metadata={"help": "width of the bottleneck, in place of reduction_factor"}
    )
    size_pattern: dict[str, int] | None = field(
        default=None, metadata={"help": "widths of bottlenecks that are not the usual one, by layer name or regex"}
    )
    hidden_size: int | None = field(
        default=None, metadata={"help": "width of a block's output; None: as the model's config says"}
    )
    non_linearity: str | None = field(default=None, metadata={"help": f"one of {', '.join(ACTIVATIONS)}"})
    reads: Literal["output", "input", "both"] | None = field(
        default=None,
        metadata={"help": "what goes into the bottleneck: the layer's output, its input, or (with taps) their sum"},
    )
    tap_modules: dict[str, str] | None = field(
        default=None,
        metadata={"help": "for a target's name ending, the module beside it whose input is taken for the layer's"},
    )
    renorm: bool | None = field(
        default=None,
        metadata={"help": "the targets are norms: what an adapter makes of their output is added to their input"},
    )
    scaling: float | Literal["learned", "channel"] | None = field(
        default=None, metadata={"help": "factor of the update: a number, one learned number, or one for each output"}
    )
    gating: bool = field(
        default=False, metadata={"help": "a learned gate in 0..1 multiplies each sample's update (2110.07577)"}
    )
    norm_before: bool = field(default=False, metadata={"help": "a LayerNorm in front of the bottleneck"})
    norm_after: bool = field(default=False, metadata={"help": "a LayerNorm on the update"})
    residual_before_norm: bool = field(
        default=False, metadata={"help": "norm_after comes after the layer's output was added"}
    )
    dropout: float = field(default=0.0, metadata={"help": "dropout probability on the update"})
    drop_first: int = field(
        default=0,
        metadata={"help": "AdapterDrop: a training step rests the adapters of its first 0..drop_first layers"},
    )
    phm_dim: int | None = field(
        default=None, metadata={"help": "Kronecker terms of both projections (Compacter); 0: plain matrices"}
    )
    phm_rank: int = field(default=1, metadata={"help": "rank of the terms' matrices; 0: full"})
    phm_rule_rank: int = field(default=0, metadata={"help": "rank of the rules' matrices; 0: full"})
    phm_shared_rule: bool = field(default=True, metadata={"help": "all layers share the rules"})
    phm_shared_weights: bool = field(default=False, metadata={"help": "all layers share the terms' matrices"})
    phm_bias: bool = field(default=True, metadata={"help": "Kronecker projections have biases"})
    phm_learn_rule: bool = field(default=True, metadata={"help": "the rules are trained"})
    invertible: Literal["nice", "glow"] | None = field(
        default=None, metadata={"help": "an invertible adapter after the embedding, additive or affine (2005.00247)"}
    )
    invertible_modules: list[str] | None = field(
        default=None, metadata={"help": "the modules whose output it changes; None: the embedding of known models"}
    )
    invertible_head: list[str] | None = field(
        default=None, metadata={"help": "output embeddings whose input its inverse changes"}
    )
    invertible_reduction_factor: float = field(
        default=2.0, metadata={"help": "half of the width / width of its bottleneck"}
    )
    init_weights: bool | Literal["bert", "houlsby"] = field(
        default=True,
        metadata={
            "help": "start as the base model (up = 0), at random (False), or near it: 'bert', normal with deviation "
            "0.02; 'houlsby', truncated normal with deviation 0.01"
        },
    )

    def __post_init__(self):
        super().__post_init__()
        for name, value in {**OTHERWISE, **VARIANTS[self.variant]}.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        check_range(self, "reduction_factor", above=0)
        check_range(self, "invertible_reduction_factor", above=0)
        check_range(self, "dropout", 0, 1)
        for name in ("drop_first", "phm_dim", "phm_rank", "phm_rule_rank"):
            check_range(self, name, 0)
        for name in ("bottleneck_size", "hidden_size"):
            if getattr(self, name) is not None:
                check_range(self, name, 1)
        check_pattern(self, "size_pattern", 1)
        if isinstance(self.scaling, (int, float)):
            check_range(self, "scaling")
        if self.non_linearity not in ACTIVATIONS:
            raise ConfigError(
                f"BottleneckConfig.non_linearity must be one of {', '.join(ACTIVATIONS)}, got {self.non_linearity!r}."
            )
        self._check_together()

    def _check_together(self):
        """Raise ConfigError for fields that contradict each other."""
        if self.reads == "both" and not self.tap_modules:
            raise ConfigError(
                "BottleneckConfig.reads='both' adds what a tapped module gets to the layer's output: tap_modules must "
                "name that module for each target."
            )
        if self.tap_modules and self.reads == "output":
            raise ConfigError("BottleneckConfig.tap_modules has no use with reads='output'; set 'input' or 'both'.")
        if self.renorm and self.reads != "output":
            raise ConfigError(f"BottleneckConfig.renorm needs reads='output', got {self.reads!r}.")
        if self.residual_before_norm and (not self.norm_after or self.reads == "input" or self.renorm):
            raise ConfigError(
                "BottleneckConfig.residual_before_norm needs norm_after=True, reads other than 'input', and no renorm."
            )
        if self.invertible_head and not self.invertible:
            raise ConfigError("BottleneckConfig.invertible_head needs invertible to be 'nice' or 'glow'.")
