"""P-tuning: virtual tokens that a small network makes from learned embeddings (arXiv 2103.10385)."""

import enum
import warnings
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from peft.config import PromptLearningConfig
from peft.core.validate import check_range
from peft.enums import PeftType
from peft.prompts.encoder import PromptEncoder as Encoder
from peft.registry import register


class PromptEncoderReparameterizationType(str, enum.Enum):
    """The network that makes the virtual tokens."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """P-tuning. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.P_TUNING

    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = field(
        default=PromptEncoderReparameterizationType.MLP, metadata={"help": "the network: MLP or LSTM"}
    )
    encoder_hidden_size: int | None = field(default=None, metadata={"help": "its inner width, default token_dim"})
    encoder_num_layers: int = field(default=2, metadata={"help": "layers of the LSTM; the MLP always has three"})
    encoder_dropout: float = field(default=0.0, metadata={"help": "dropout between the LSTM's layers"})

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "encoder_num_layers", 1)
        check_range(self, "encoder_dropout", 0, 1)


class PromptEncoder(Encoder):
    """head(embedding). For inference the result is worked out once, and the network left away.

    embedding   (virtual tokens, dim)
    lstm_head   bidirectional, dim -> 2 * hidden (LSTM only)
    mlp_head    dim or 2 * hidden -> hidden or 2 * hidden -> dim
    """

    network = ("lstm_head", "mlp_head")

    def __init__(self, config):
        super().__init__()
        dim, hidden = config.token_dim, config.encoder_hidden_size
        self.embedding = nn.Embedding(config.num_virtual_tokens * config.num_transformer_submodules, dim)
        self.lstm_head = self.mlp_head = None
        if config.inference_mode:
            return
        if config.encoder_reparameterization_type == "LSTM":
            self.lstm_head = nn.LSTM(
                dim,
                hidden,
                config.encoder_num_layers,
                dropout=config.encoder_dropout,
                bidirectional=True,
                batch_first=True,
            )
            self.mlp_head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, dim))
            return
        if config.encoder_num_layers != 2:
            warnings.warn("encoder_num_layers has no effect on the MLP, which has two inner layers.", stacklevel=5)
        inner = [nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
        self.mlp_head = nn.Sequential(*inner, nn.Linear(hidden, dim))

    @classmethod
    def fill_sizes(cls, config, model_config):
        config.encoder_hidden_size = config.encoder_hidden_size or config.token_dim

    def table(self):
        weight = self.embedding.weight
        if self.mlp_head is None:
            return weight
        return self.mlp_head(weight if self.lstm_head is None else self.lstm_head(weight[None])[0][0])

    def forward(self, batch_size, task_ids=None):
        return self.table().expand(batch_size, -1, -1)


register("P_TUNING", PromptEncoderConfig, encoder=PromptEncoder)
