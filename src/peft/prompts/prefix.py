"""Prefix tuning: learned keys and values in front of those of every attention layer (arXiv 2101.00190)."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import nn

from peft.config import PromptLearningConfig
from peft.enums import PeftType
from peft.errors import ConfigError
from peft.prompts.encoder import PromptEncoder
from peft.prompts.sizes import by_layer, first
from peft.registry import register


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Prefix tuning. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.PREFIX_TUNING

    init_weights: Literal["zero"] | None = field(
        default=None, metadata={"help": "None: random; 'zero': keys and values start at zero"}
    )
    encoder_hidden_size: int | None = field(
        default=None, metadata={"help": "inner width of the projection, default token_dim"}
    )
    prefix_projection: bool = field(
        default=False, metadata={"help": "train the prefix through a two-layer perceptron, which is not saved"}
    )


class CacheEncoder(PromptEncoder):
    """A table (virtual tokens, layers * 2 * token_dim) that holds the keys and values of each layer."""

    where = "cache"

    def __init__(self, config):
        super().__init__()
        self.layers, self.heads = config.num_layers, config.num_attention_heads
        self.submodules = config.num_transformer_submodules

    @classmethod
    def fill_sizes(cls, config, model_config):
        """Count as the key/value cache does: heads that queries share, the decoder's sizes, the widest layer's."""
        heads = first(model_config, "decoder_attention_heads") or config.num_attention_heads
        dim = first(model_config, "d_kv") or max(filter(None, by_layer(model_config, "head_dim")), default=None)
        dim = dim or (heads and config.token_dim and config.token_dim // heads)
        if getattr(model_config, "is_encoder_decoder", False):
            config.num_layers = first(model_config, "num_decoder_layers", "decoder_layers") or config.num_layers
        shared = set(by_layer(model_config, "num_key_value_heads"))
        if len(shared) > 1:
            raise ConfigError(
                f"Prefix tuning needs equally many key/value heads in all layers; here some have {min(shared)}, some "
                f"{max(shared)}. Use prompt tuning or LoRA."
            )
        one_for_all = getattr(model_config, "multi_query", False)
        if one_for_all and not getattr(model_config, "new_decoder_architecture", False):
            heads = 1
        heads = shared.pop() or heads
        if heads and dim:
            config.num_attention_heads, config.token_dim = heads, heads * dim

    def key_values(self, table, layer, batch_size):
        """(keys, values) of one layer, each (batch, heads, virtual tokens, head dim)."""
        parts = table.view(table.shape[0], self.layers * 2, self.heads, -1)
        # Files of encoder-decoder models are read with a stride for cross-attention, which gets no prefix: every other
        # pair is skipped, and the table read twice over. Trained prefixes rely on it.
        first = 2 * layer * self.submodules % (2 * self.layers)
        pair = parts[:, first : first + 2].permute(1, 2, 0, 3)
        return tuple(t.expand(batch_size, -1, -1, -1) for t in pair)


class PrefixEncoder(CacheEncoder):
    """P, or W2·tanh(W1·P) with prefix_projection. For inference the projection is worked out once and left away.

    embedding   (virtual tokens, layers * 2 * token_dim); projected: (virtual tokens, token_dim)
    transform   token_dim -> encoder_hidden_size -> layers * 2 * token_dim
    """

    network = ("transform",)

    def __init__(self, config):
        super().__init__(config)
        width = config.num_layers * 2 * config.token_dim
        projected = config.prefix_projection and not config.inference_mode
        self.embedding = nn.Embedding(config.num_virtual_tokens, config.token_dim if projected else width)
        self.transform = None
        if projected:
            hidden = config.encoder_hidden_size or config.token_dim
            self.transform = nn.Sequential(nn.Linear(config.token_dim, hidden), nn.Tanh(), nn.Linear(hidden, width))
        if config.init_weights == "zero":
            for p in (self.transform[2] if projected else self.embedding).parameters():
                nn.init.zeros_(p)

    @classmethod
    def fill_sizes(cls, config, model_config):
        super().fill_sizes(config, model_config)
        config.encoder_hidden_size = config.encoder_hidden_size or config.token_dim

    def table(self):
        return self.embedding.weight if self.transform is None else self.transform(self.embedding.weight)


register("PREFIX_TUNING", PrefixTuningConfig, encoder=PrefixEncoder)
