"""Context-aware prompt tuning: real tokens as the prompt, moved a little from where they are (arXiv 2410.17222).

Each token of the prompt, and of the input, has a type: 0 counts as padding; otherwise type % 4 says whether it belongs
to the input's template (1), the input (2), the output's template (3) or a label (0). Labels stay where they are.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn

from peft.config import PromptLearningConfig
from peft.enums import PeftType
from peft.errors import ConfigError
from peft.prompts.encoder import PromptEncoder
from peft.prompts.insert import IGNORED
from peft.registry import register

FIXED = 1e-10  # how far a label token may move


@dataclass
class CPTConfig(PromptLearningConfig):
    """CPT, for causal language models. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.CPT

    cpt_token_ids: list[int] | None = field(default=None, metadata={"help": "the tokens of the prompt"})
    cpt_mask: list[int] | None = field(default=None, metadata={"help": "1 for each token that counts"})
    cpt_tokens_type_mask: list[int] | None = field(default=None, metadata={"help": "the type of each token"})
    opt_weighted_loss_type: Literal["none", "decay"] | None = field(
        default="none", metadata={"help": "decay: labels further back weigh less"}
    )
    opt_loss_decay_factor: float | None = field(default=1.0, metadata={"help": "weight of a label by the next one's"})
    opt_projection_epsilon: float | None = field(default=0.1, metadata={"help": "how far input tokens may move"})
    opt_projection_format_epsilon: float | None = field(
        default=0.1, metadata={"help": "how far template tokens may move"}
    )
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "the tokenizer of the tokens"})

    def __post_init__(self):
        self.num_layers = self.token_dim = self.num_attention_heads = None
        self.num_transformer_submodules = 1
        super().__post_init__()
        if self.task_type != "CAUSAL_LM":
            raise ConfigError(f"CPTConfig.task_type must be CAUSAL_LM, got {self.task_type!r}.")
        if self.cpt_token_ids is None:
            self.cpt_token_ids = [0]
        self.num_virtual_tokens = len(self.cpt_token_ids)
        for name in ("cpt_mask", "cpt_tokens_type_mask"):
            if getattr(self, name) is None:
                setattr(self, name, [1] * self.num_virtual_tokens)
            elif len(getattr(self, name)) != self.num_virtual_tokens:
                raise ConfigError(
                    f"CPTConfig.{name} must have as many entries as cpt_token_ids: {self.num_virtual_tokens}, "
                    f"got {len(getattr(self, name))}."
                )


class CPTEmbedding(PromptEncoder):
    """embedding + delta, each row of delta within its token's reach.

    embedding        (tokens, dim), the tokens as the model has them
    delta_embedding  (tokens, dim), trained
    """

    frozen = ("embedding",)

    def __init__(self, config, word_embeddings):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.num_virtual_tokens, config.token_dim)
        self.embedding.requires_grad_(False)
        self.delta_embedding = nn.Embedding(config.num_virtual_tokens, config.token_dim)
        nn.init.zeros_(self.delta_embedding.weight)
        if not config.inference_mode:
            with torch.no_grad():
                ids = torch.tensor(config.cpt_token_ids, device=word_embeddings.weight.device)
                self.embedding.weight = nn.Parameter(word_embeddings(ids).float().clone(), requires_grad=False)
        self.register_buffer("reach", self.reach_of(config), persistent=False)

    @classmethod
    def make(cls, config, word_embeddings):
        return cls(config, word_embeddings)

    @staticmethod
    def reach_of(config):
        """(tokens,): how long a row of delta may be."""
        scale = math.sqrt(config.token_dim / 2048)  # the paper's reach is for embeddings of 2048 numbers
        by_part = (
            FIXED,
            config.opt_projection_format_epsilon * scale,
            config.opt_projection_epsilon * scale,
            config.opt_projection_format_epsilon * scale,
        )
        return torch.tensor([by_part[t % 4] if t > 0 else FIXED for t in config.cpt_tokens_type_mask])

    def table(self):
        return self.embedding.weight + self.delta()

    def delta(self):
        """The trained rows, put back within reach first: training is a projected gradient descent."""
        weight = self.delta_embedding.weight
        with torch.no_grad():
            norm = weight.norm(dim=1)
            weight.mul_((self.reach / norm.clamp(min=FIXED)).clamp(max=1)[:, None])
        may_move = (self.reach > FIXED)[:, None]
        return torch.where(may_move, weight, weight.detach())

    def load_table(self, table):
        super().load_table(table)
        self.delta_embedding.weight.zero_()

    def forward(self, batch_size, task_ids=None):
        return self.table().expand(batch_size, -1, -1)

    def run(self, forward, kwargs):
        """The output over prompt and input, with the loss of the label tokens in both.

        kwargs["input_type_mask"] has the type of each input token; without it they are all labels.
        """
        kwargs = dict(kwargs)
        types, labels = kwargs.pop("input_type_mask", None), kwargs.pop("labels", None)
        output = forward(kwargs)
        if labels is None:
            return output
        if types is None:
            types = torch.full_like(labels, 4)
        types = types.to(labels.device)
        prompt_types = torch.tensor(self.config.cpt_tokens_type_mask, device=labels.device).expand(len(labels), -1)
        prompt_labels = torch.tensor(self.config.cpt_token_ids, device=labels.device).expand(len(labels), -1)
        # Numbers above the prompt's, of the same part: labels of different examples stay different. Upstream adds the
        # largest one itself, which makes labels something else unless it is a multiple of four.
        above = -(-prompt_types.max() // 4) * 4
        types = torch.cat([prompt_types, torch.where(types > 0, types + above, types)], dim=1)
        labels = torch.cat([prompt_labels, labels], dim=1).masked_fill(~is_label(types), IGNORED)
        output.loss = weighted_loss(output.logits, labels, types, self.decay())
        return output

    def decay(self):
        return self.config.opt_loss_decay_factor if self.config.opt_weighted_loss_type == "decay" else 1.0


def is_label(types):
    return (types > 0) & (types % 4 == 0)


def weighted_loss(logits, labels, types, decay):
    """Mean cross entropy of the label tokens; those of the last label weigh 1, of the one before `decay`, and so on."""
    labels, types = labels[:, 1:], types[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels.to(logits.device), reduction="none")
    counted = labels != IGNORED
    weights = torch.ones_like(losses)
    if decay != 1:
        for row, row_types in zip(weights, types):
            found = row_types[is_label(row_types)].unique().flip(0)
            for age, label in enumerate(found):
                row[row_types == label] = decay**age
    return (losses * weights)[counted].mean()


register("CPT", CPTConfig, encoder=CPTEmbedding)
