"""The Shadow config."""

from dataclasses import dataclass, field
from typing import ClassVar

from peft.config import TargetConfig
from peft.core.match import ALL_LINEAR
from peft.core.validate import check_range
from peft.enums import PeftType
from peft.errors import ConfigError

MIRROR = "mirror"


@dataclass
class ShadowConfig(TargetConfig):
    """Shadow on the blocks of a transformer. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.SHADOW
    SIZES: ClassVar = (  # of a backbone that is built here
        "shadow_num_hidden_layers",
        "shadow_hidden_size",
        "shadow_num_attention_heads",
        "shadow_intermediate_size",
    )

    r: int = field(default=8, metadata={"help": "rank of the correction of a block's input"})
    shadow_alpha: float = field(default=0.1, metadata={"help": "what the correction is multiplied by"})
    shadow_dropout: float = field(default=0.2, metadata={"help": "dropout probability on the difference"})
    init_weights: bool = field(default=True, metadata={"help": "start as the base model (up = 0), else at random"})
    shadow_model: str = field(
        default=MIRROR, metadata={"help": "'mirror': a small model of the base's kind; else a folder or hub id"}
    )
    shadow_num_hidden_layers: int | None = field(default=None, metadata={"help": "layers of the backbone; None: 1"})
    shadow_hidden_size: int | None = field(default=None, metadata={"help": "its width; None: the base's"})
    shadow_num_attention_heads: int | None = field(default=None, metadata={"help": "its heads; None: the base's"})
    shadow_intermediate_size: int | None = field(default=None, metadata={"help": "its MLPs' width; None: the base's"})
    share_embeddings: bool = field(
        default=True, metadata={"help": "a backbone as wide as the base reads the base's embeddings"}
    )
    update_hidden_size: int | None = field(
        default=None, metadata={"help": "width of the MLPs that update the shadow state; None: r"}
    )
    auxiliary_loss_weight: float = field(
        default=0.05, metadata={"help": "weight of the loss of what the backbone alone predicts"}
    )

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "r", 1)
        check_range(self, "shadow_alpha")
        check_range(self, "shadow_dropout", 0, 1)
        check_range(self, "auxiliary_loss_weight", 0)
        for name in (*self.SIZES, "update_hidden_size"):
            if getattr(self, name) is not None:
                check_range(self, name, 1)
        if isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR:
            raise ConfigError("Shadow adapts whole blocks, so target_modules cannot be 'all-linear'.")
        if not self.shadow_model:
            raise ConfigError("ShadowConfig.shadow_model is empty; give 'mirror', a folder or a hub id.")
        given = [name for name in self.SIZES if getattr(self, name) is not None]
        if self.shadow_model != MIRROR and given:
            raise ConfigError(f"shadow_model={self.shadow_model!r} has sizes of its own; leave out {', '.join(given)}.")
