"""Trainable tokens: selected rows of an embedding, and of the head tied to it, are replaced by trained ones."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from peft.config import PeftConfig
from peft.core import match
from peft.core.adapter import Derived, Param, Reweight, Val
from peft.core.layer import AdapterLayer
from peft.core.tuner import Tuner
from peft.enums import PeftType
from peft.errors import ConfigError
from peft.registry import register


@dataclass
class TrainableTokensConfig(PeftConfig):
    """Which rows of which embedding are trained. target_modules=None: the input embedding."""

    METHOD: ClassVar = PeftType.TRAINABLE_TOKENS

    token_indices: list[int] = field(default_factory=list, metadata={"help": "ids of the tokens to train"})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "embedding layers"})
    init_weights: bool = field(default=True, metadata={"help": "start from the rows as they are, else at random"})

    # What matching layers reads of every config, and this method does not have.
    exclude_modules: ClassVar = None
    modules_to_save: ClassVar = None
    layers_to_transform: ClassVar = None
    layers_pattern: ClassVar = None


class TrainableTokens(Reweight):
    """W[token_indices] = delta, whatever the rest of W."""

    prefix = "trainable_tokens_"
    kinds = ("embedding", "linear")
    follows_ties = True

    trainable_tokens_delta = Param()  # (tokens, dim)
    trainable_tokens_slot = Derived()  # (vocabulary,): a token's row in delta, or -1
    token_indices = Val()

    def build(self, c, where):
        vocabulary, dim = self.base.weight.shape
        if out_of_range := [i for i in c.token_indices if not 0 <= i < vocabulary]:
            raise ConfigError(f"token_indices {out_of_range} are outside the vocabulary of {vocabulary} tokens.")
        if len(set(c.token_indices)) != len(c.token_indices):
            raise ConfigError("token_indices names a token twice.")
        self.token_indices = list(c.token_indices)
        where = {**where, "dtype": self.base.weight.dtype}
        self.trainable_tokens_delta = nn.Parameter(torch.empty(len(c.token_indices), dim, **where))

    def derive(self, c):
        index = torch.tensor(self.token_indices, dtype=torch.long)
        slot = torch.full((self.base.weight.shape[0],), -1, dtype=torch.int32)
        slot[index] = torch.arange(len(index), dtype=torch.int32)
        self.trainable_tokens_slot = slot.to(self.base.weight.device)

    def reset(self, c):
        if c.init_weights:
            self.trainable_tokens_delta.copy_(self.base.weight[self.token_indices])
        else:
            nn.init.normal_(self.trainable_tokens_delta)

    @classmethod
    def tie(cls, layer, source, name, key):
        """Let the head `layer`, tied to the embedding of `source`, train the very same rows. Files list them twice."""
        twin, adapter = source.adapters[name], cls(layer, name, key)
        layer._modules["trainable_tokens_delta"] = source._modules["trainable_tokens_delta"]
        adapter.token_indices, adapter.frozen = twin.token_indices, twin.frozen
        layer.adapters[name] = adapter
        layer._changed()

    def output(self, x, y):
        rows = self.trainable_tokens_delta
        if self.kind.name == "linear":
            index = torch.tensor(self.token_indices, device=y.device)
            return y.index_copy(-1, index, F.linear(x, rows.to(x.dtype)).to(y.dtype))
        slot = self.trainable_tokens_slot[x].long()
        new = self.kind.scaled(self.base, F.embedding(slot.clamp(min=0), rows).to(y.dtype))
        return torch.where((slot >= 0).unsqueeze(-1), new, y)

    def merged_weight(self, W):
        """Canonical W is (dim, vocabulary) for an embedding, (vocabulary, dim) for a head."""
        index = torch.tensor(self.token_indices, device=W.device)
        rows = self.trainable_tokens_delta.to(W.dtype)
        return W.index_copy(1, index, rows.T) if self.kind.name == "embedding" else W.index_copy(0, index, rows)


class TrainableTokensLayer(AdapterLayer):
    adapter_cls = TrainableTokens


class TrainableTokensModel(Tuner):
    layer_cls = TrainableTokensLayer

    def prepare_config(self, config):
        """No targets: the input embedding."""
        if config.target_modules is None and hasattr(self.model, "get_input_embeddings"):
            embedding = self.model.get_input_embeddings()
            config.target_modules = next((key for key, _, m in match.walk(self.model) if m is embedding), None)
        super().prepare_config(config)


register("TRAINABLE_TOKENS", TrainableTokensConfig, tuner=TrainableTokensModel, prefix="trainable_tokens_", mixed=True)
