"""Multitask prompt tuning: a shared prompt times a low-rank factor of each task (arXiv 2303.02861)."""

import enum
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from peft.core.validate import check_range
from peft.enums import PeftType
from peft.errors import AdapterError, AdapterMismatchError, ConfigError
from peft.prompts.prompt_tuning import PromptEmbedding, PromptTuningConfig
from peft.registry import register


class MultitaskPromptTuningInit(str, enum.Enum):
    """Where the prompt starts; the last three read another prompt's file."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


SOURCES = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")


@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Multitask prompt tuning. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.MULTITASK_PROMPT_TUNING

    prompt_tuning_init: MultitaskPromptTuningInit | str = field(
        default=MultitaskPromptTuningInit.RANDOM,
        metadata={
            "help": "start: RANDOM, TEXT, or from a file: AVERAGE_SOURCE_TASKS, EXACT_SOURCE_TASK, ONLY_SOURCE_SHARED"
        },
    )
    prompt_tuning_init_state_dict_path: str | None = field(
        default=None, metadata={"help": "file of the source prompt, .safetensors or .bin"}
    )
    prompt_tuning_init_task: int | None = field(default=0, metadata={"help": "the task for EXACT_SOURCE_TASK"})
    num_ranks: int | None = field(default=1, metadata={"help": "rank of a task's factor"})
    num_tasks: int | None = field(default=1, metadata={"help": "number of tasks"})

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "num_ranks", 1)
        check_range(self, "num_tasks", 1)

    @staticmethod
    def starts():
        return MultitaskPromptTuningInit


class MultitaskPromptEmbedding(PromptEmbedding):
    """embedding ∘ (cols[task] @ rows[task]).

    prefix_task_cols  (tasks, virtual tokens, ranks)
    prefix_task_rows  (tasks, ranks, dim)
    """

    on_decoder = True  # not when generating: upstream trains encoder-decoders so, and its files are used so
    extra_tables = ("prefix_task_cols", "prefix_task_rows")

    def __init__(self, config, word_embeddings):
        super().__init__(config, word_embeddings)
        count, dim = self.embedding.weight.shape
        shapes = ((config.num_tasks, count, config.num_ranks), (config.num_tasks, config.num_ranks, dim))
        self.prefix_task_cols, self.prefix_task_rows = (nn.Parameter(torch.randn(s) * 0.02) for s in shapes)
        if not config.inference_mode and config.prompt_tuning_init in SOURCES:
            self.start_from_file(config)

    @torch.no_grad()
    def start_from_file(self, config):
        """Take the shared prompt, and unless ONLY_SOURCE_SHARED the factors, of a trained prompt's file."""
        path = config.prompt_tuning_init_state_dict_path
        if path is None:
            raise ConfigError(
                f"prompt_tuning_init={config.prompt_tuning_init!r} needs prompt_tuning_init_state_dict_path."
            )
        source = read_tables(path)
        wanted = ["prompt_embeddings", *self.extra_tables]
        if config.prompt_tuning_init == "ONLY_SOURCE_SHARED":
            wanted = wanted[:1]
        if missing := [name for name in wanted if name not in source]:
            raise AdapterMismatchError(f"{path} has no {', '.join(missing)}: it is not a multitask prompt's file.")
        PromptEmbedding.load_tables(self, {**self.tables(), "prompt_embeddings": source["prompt_embeddings"]})
        for name in wanted[1:]:
            value = source[name]
            if config.prompt_tuning_init == "AVERAGE_SOURCE_TASKS":
                value = value.mean(0, keepdim=True)
            elif 0 <= config.prompt_tuning_init_task < len(value):
                value = value[config.prompt_tuning_init_task, None]
            else:
                raise ConfigError(
                    f"prompt_tuning_init_task={config.prompt_tuning_init_task}, but {path} has {len(value)} tasks."
                )
            place = getattr(self, name)
            if value.shape[1:] != place.shape[1:]:
                raise AdapterMismatchError(
                    f"{name} of {path} is {tuple(value.shape[1:])} a task, but num_ranks={config.num_ranks} and the "
                    f"model ask for {tuple(place.shape[1:])}."
                )
            place.copy_(value.expand_as(place))

    def forward(self, batch_size, task_ids=None):
        if task_ids is None:
            raise AdapterError("Multitask prompt tuning needs task_ids, one number for each sample of the batch.")
        task_ids = torch.as_tensor(task_ids, device=self.prefix_task_cols.device)
        return self.embedding.weight * (self.prefix_task_cols[task_ids] @ self.prefix_task_rows[task_ids])


def read_tables(path):
    """The tensors of a prompt's file."""
    if str(path).endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


register("MULTITASK_PROMPT_TUNING", MultitaskPromptTuningConfig, encoder=MultitaskPromptEmbedding)
