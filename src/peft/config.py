"""Configs: plain dataclasses that check their own values and travel as adapter_config.json."""

import dataclasses
import inspect
import json
import os
import warnings
from dataclasses import dataclass, field
from typing import ClassVar

from peft import registry
from peft.core.validate import check_fields
from peft.enums import PeftType, TaskType
from peft.errors import ConfigError
from peft.storage import hub
from peft.storage.files import read_json
from peft.version import __version__

CONFIG_NAME = "adapter_config.json"


@dataclass
class PeftConfigMixin(hub.Pushable):
    """How configs are read and written. Its fields name the task and the method."""

    task_type: str | TaskType | None = field(default=None, metadata={"help": "what the model does, a TaskType"})
    peft_type: str | PeftType | None = field(default=None, metadata={"help": "the method, a PeftType"})
    auto_mapping: dict | None = field(
        default=None, metadata={"help": "class and library of the base model, written where task_type is None"}
    )
    peft_version: str | None = field(default=None, metadata={"help": "the peft that wrote the config"})

    METHOD: ClassVar[PeftType | None] = None  # each method's config sets this
    NOT_SAVED: ClassVar[tuple[str, ...]] = ()  # fields that stay in memory

    def __post_init__(self):
        if self.METHOD is not None:
            self.peft_type = self.METHOD
        if self.peft_version is None:
            self.peft_version = __version__
        check_fields(self)
        if self.task_type is not None and self.task_type not in TaskType.__members__:
            known = ", ".join(TaskType.__members__)
            raise ConfigError(f"{type(self).__name__}.task_type must be one of {known}, got {self.task_type!r}.")

    def to_dict(self):
        """All saved fields as a dict."""
        data = dataclasses.asdict(self)
        return {k: v for k, v in data.items() if k not in self.NOT_SAVED}

    def to_json(self):
        """The text of adapter_config.json: sorted keys, sets as sorted lists, so equal configs give equal bytes."""

        def plain(value):
            if isinstance(value, (set, frozenset)):
                return sorted(value)
            raise TypeError(f"cannot write {value!r} to {CONFIG_NAME}")

        return json.dumps(self.to_dict(), indent=2, sort_keys=True, default=plain)

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        """Write adapter_config.json into a folder, whole or not at all.

        auto_mapping_dict: what to store as auto_mapping. With push_to_hub=True further arguments go to the hub.
        """
        from peft.storage.files import commit_files

        if os.path.isfile(save_directory):
            raise AssertionError(f"{save_directory} is a file; save_pretrained needs a folder.")
        auto_mapping = kwargs.pop("auto_mapping_dict", None)
        config = self if auto_mapping is None else dataclasses.replace(self, auto_mapping=auto_mapping)
        commit_files(save_directory, {CONFIG_NAME: config.to_json().encode()})
        if push_to_hub:
            hub.upload_folder(save_directory, kwargs.pop("repo_id", os.path.basename(save_directory)), **kwargs)

    @classmethod
    def from_peft_type(cls, **kwargs):
        """A config of the class that kwargs["peft_type"] names (or this class), warning about unknown fields."""
        peft_type = kwargs.get("peft_type")
        config_cls = registry.method(peft_type).config if peft_type else cls
        known = inspect.signature(config_cls).parameters
        unknown = {k: kwargs.pop(k) for k in list(kwargs) if k not in known or k in config_cls.NOT_SAVED}
        unknown = {k: v for k, v in unknown.items() if k not in config_cls.NOT_SAVED and v is not None}
        if "model_class" in unknown:
            raise ConfigError(
                "This adapter_config.json is of the adapters library. Load bottleneck adapters of that library with "
                "peft.integrations.adapters_library.load_adapters_checkpoint(model, folder)."
            )
        if unknown and not peft_type:
            raise ConfigError(
                f"A config without peft_type has the unknown fields {sorted(unknown)}. "
                "Is this an adapter_config.json of peft? Then add its peft_type."
            )
        if unknown:
            warnings.warn(
                f"Unexpected keyword arguments {sorted(unknown)} for class {config_cls.__name__}, these are ignored. "
                "They were probably written by a newer peft; if they change the method, upgrade before using it.",
                stacklevel=3,
            )
        return config_cls(**config_cls.check_kwargs(**kwargs))

    @classmethod
    def from_json_file(cls, path_json_file, **kwargs):
        """The dict in an adapter_config.json."""
        return read_json(path_json_file)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder=None, **kwargs):
        """Read a config from a folder or the hub; its class follows from the peft_type in the file.

        kwargs: hub options (revision, token, cache_dir, local_files_only, ...); other names fill fields that the
        file leaves out. Raises ValueError where no config is found.
        """
        hub_options, extra = hub.split_options(kwargs)
        path = hub.find_file(pretrained_model_name_or_path, CONFIG_NAME, subfolder=subfolder, **hub_options)
        if path is None:
            where = f"{pretrained_model_name_or_path}" + (f"/{subfolder}" if subfolder else "")
            raise ValueError(f"Can't find '{CONFIG_NAME}' at '{where}'")
        config = cls.from_peft_type(**{**extra, **read_json(path)})
        config.found_at(pretrained_model_name_or_path, subfolder=subfolder, **hub_options)
        return config

    def found_at(self, model_id, **options):
        """Called with the folder or repository that the config was read from; for configs that need its other files."""

    @classmethod
    def _get_peft_type(cls, model_id, **hub_options):
        return PeftConfigMixin.from_pretrained(model_id, **hub_options).peft_type

    @classmethod
    def check_kwargs(cls, **kwargs):
        """kwargs, checked to be usable in a config file of this class."""
        return kwargs

    @property
    def is_prompt_learning(self):
        return False

    @property
    def is_adaption_prompt(self):
        return False


@dataclass
class PeftConfig(PeftConfigMixin):
    """What every method's config has."""

    base_model_name_or_path: str | None = field(default=None, metadata={"help": "the base model's hub id or folder"})
    revision: str | None = field(default=None, metadata={"help": "the base model's revision on the hub"})
    inference_mode: bool = field(default=False, metadata={"help": "True: the adapter's weights are not trained"})


@dataclass
class ModulesConfig(PeftConfig):
    """What the configs of all methods that adapt layers share: which modules, and which others are trained whole."""

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "names or name endings of modules, one regex, or 'all-linear'"}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "modules that are trained whole and saved with the adapter"}
    )
    # Fields that some methods have and matching reads of every config.
    exclude_modules: ClassVar[list[str] | str | None] = None
    layers_to_transform: ClassVar[list[int] | int | None] = None
    layers_pattern: ClassVar[list[str] | str | None] = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"{name} cannot be used when target_modules is a str; write the layers into the regex."
                    )
        if self.layers_pattern and not self.layers_to_transform and self.layers_to_transform != 0:
            raise ConfigError("When layers_pattern is given, layers_to_transform must say which layers.")


@dataclass
class LayersConfig(ModulesConfig):
    """Modules, in some of the model's layers."""

    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "adapt the targets in these layers only, by index"}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "name of the list that holds the layers, where it is not found by itself"}
    )


@dataclass
class TargetConfig(LayersConfig):
    """Modules, in some of the model's layers, but for some."""

    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "names, name endings or one regex of modules that stay as they are"}
    )


@dataclass
class PromptLearningConfig(PeftConfig):
    """What the configs of methods that learn virtual tokens share; sizes left None are read from the model."""

    num_virtual_tokens: int | None = field(default=None, metadata={"help": "number of learned tokens"})
    token_dim: int | None = field(default=None, metadata={"help": "width of the base model's embeddings"})
    num_transformer_submodules: int | None = field(default=None, metadata={"help": "2 for encoder-decoder, else 1"})
    num_attention_heads: int | None = field(default=None, metadata={"help": "key/value heads of the base model"})
    num_layers: int | None = field(default=None, metadata={"help": "layers of the base model"})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "modules that are trained whole and saved with the prompt"}
    )

    @property
    def is_prompt_learning(self):
        return True


def get_peft_config(config_dict):
    """A config of the class that config_dict["peft_type"] names."""
    return registry.method(config_dict["peft_type"]).config(**config_dict)
