"""Prompt tuning: learned embeddings in front of those of the input (arXiv 2104.08691)."""

import enum
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from peft.config import PromptLearningConfig
from peft.enums import PeftType
from peft.errors import ConfigError
from peft.prompts.encoder import PromptEncoder
from peft.registry import register


class PromptTuningInit(str, enum.Enum):
    """Where the virtual tokens start."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.PROMPT_TUNING

    prompt_tuning_init: PromptTuningInit | str = field(
        default=PromptTuningInit.RANDOM,
        metadata={"help": "start: RANDOM; TEXT, the tokens of a text; SAMPLE_VOCAB, random tokens of the vocabulary"},
    )
    prompt_tuning_init_text: str | None = field(default=None, metadata={"help": "the text for TEXT"})
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "the tokenizer for TEXT"})
    tokenizer_kwargs: dict | None = field(default=None, metadata={"help": "arguments to load that tokenizer with"})

    def __post_init__(self):
        super().__post_init__()
        starts = [member.value for member in type(self).starts()]
        if self.prompt_tuning_init not in starts:
            raise ConfigError(
                f"{type(self).__name__}.prompt_tuning_init must be one of {', '.join(starts)}, "
                f"got {self.prompt_tuning_init!r}."
            )
        if self.prompt_tuning_init == "TEXT":
            for name in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
                if not getattr(self, name):
                    raise ConfigError(f"prompt_tuning_init='TEXT' needs {name}.")
        elif self.tokenizer_kwargs:
            raise ConfigError("tokenizer_kwargs are for prompt_tuning_init='TEXT' only.")

    @staticmethod
    def starts():
        """The values that prompt_tuning_init may have."""
        return PromptTuningInit


class PromptEmbedding(PromptEncoder):
    """The virtual tokens themselves: embedding.weight (virtual tokens, dim)."""

    def __init__(self, config, word_embeddings):
        super().__init__()
        count = config.num_virtual_tokens * config.num_transformer_submodules
        self.embedding = nn.Embedding(count, config.token_dim)
        if not config.inference_mode and (start := start_of(config, word_embeddings, count)) is not None:
            self.embedding.weight = nn.Parameter(start)

    @classmethod
    def make(cls, config, word_embeddings):
        return cls(config, word_embeddings)

    def forward(self, batch_size, task_ids=None):
        return self.embedding.weight.expand(batch_size, -1, -1)


def start_of(config, word_embeddings, count):
    """The embeddings (count, dim), float32, of the tokens that the prompt starts from; None for a random start."""
    if config.prompt_tuning_init == "TEXT":
        ids = tokens_of(config)
        ids = (ids * -(-count // len(ids)))[:count]
    elif config.prompt_tuning_init == "SAMPLE_VOCAB":
        ids = torch.randint(0, word_embeddings.num_embeddings, (count,)).tolist()
    else:
        return None
    with torch.no_grad():
        return word_embeddings(torch.tensor(ids, device=word_embeddings.weight.device)).float().clone()


def tokens_of(config):
    """The token ids of a config's text. Raises ConfigError where there are none."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **(config.tokenizer_kwargs or {}))
    ids = tokenizer(config.prompt_tuning_init_text)["input_ids"]
    if not ids:
        raise ConfigError(f"prompt_tuning_init_text={config.prompt_tuning_init_text!r} has no tokens.")
    return ids


register("PROMPT_TUNING", PromptTuningConfig, encoder=PromptEmbedding)
