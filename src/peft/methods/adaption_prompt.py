"""Adaption prompt (LLaMA-Adapter): attention + gate · attention to learned tokens (arXiv 2303.16199)."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from peft.config import PeftConfig
from peft.core import match
from peft.core.adapter import Adapter, Param
from peft.core.hidden_states import HiddenStatesLayer
from peft.core.tuner import Tuner
from peft.core.validate import check_range
from peft.enums import PeftType
from peft.errors import ConfigError, NoMatchingPeftModuleError
from peft.ops.sources import Sources
from peft.registry import register

ATTENTION_NAMES = {"llama": "self_attn", "mistral": "self_attn", "gpt2": "attn"}  # by model type


@dataclass
class AdaptionPromptConfig(PeftConfig):
    """Learned tokens in the last attention layers. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.ADAPTION_PROMPT

    target_modules: str | None = field(default=None, metadata={"help": "name of the attention modules"})
    adapter_len: int | None = field(default=None, metadata={"help": "number of learned tokens in each layer"})
    adapter_layers: int | None = field(default=None, metadata={"help": "how many layers have them, from the last on"})

    modules_to_save: ClassVar = None  # what making adapters reads of every config, and this method does not have

    def __post_init__(self):
        super().__post_init__()
        for name in ("adapter_len", "adapter_layers"):
            if getattr(self, name) is not None:
                check_range(self, name, 1)

    @property
    def is_adaption_prompt(self):
        return True


class AdaptionPrompt(Adapter):
    """y + gate · softmax(q kᵀ / √d) v, through the output projection; k and v are those of the learned tokens."""

    prefix = "adaption_"
    kinds = ("attention",)

    adaption_prompt, adaption_gate = Param(), Param()  # (1, tokens, width), (1,)

    known = (None, None)  # (what the keys and values were made from, both), for forwards without gradients

    def build(self, c, where):
        where = {**where, "dtype": self.layer.placement(autocast=False)["dtype"]}  # files hold the base's dtype
        self.adaption_prompt = nn.Parameter(torch.empty(1, c.adapter_len, self.layer.in_features, **where))
        self.adaption_gate = nn.Parameter(torch.empty(1, **where))

    def reset(self, c):
        self.adaption_prompt.normal_()
        self.adaption_gate.zero_()

    def keys_values(self, dtype):
        prompt = self.adaption_prompt
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.kind.keys_values(self.base, prompt.to(dtype))
        sources, both = self.known
        if sources is None or not sources.unchanged() or both[0].dtype is not dtype:
            owners = [m._parameters for m in self.base.modules()]
            places = [(o, key, t, o, key, t) for o in owners for key, t in o.items() if t is not None]
            both = self.kind.keys_values(self.base, prompt.to(dtype))
            self.known = Sources([*self.places(), *places]), both
        return both

    def output(self, q, y):
        k, v = self.keys_values(q.dtype)
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1, dtype=torch.float32)
        weights = self.adaption_gate.to(q.dtype) * weights.to(q.dtype)
        return y + self.kind.read(self.base, weights, v).to(y.dtype)


class AdaptedAttention(HiddenStatesLayer):
    """An attention module with adaption prompts."""

    adapter_cls = AdaptionPrompt

    @property
    def adaption_prompt(self):
        """The active adapter's."""
        return self.live()[0].adaption_prompt

    @property
    def adaption_gate(self):
        """The active adapter's."""
        return self.live()[0].adaption_gate


class AdaptionPromptModel(Tuner):
    """A model with adaption prompts."""

    layer_cls = AdaptedAttention
    target_module_mapping = ATTENTION_NAMES

    def prepare_config(self, config):
        for name in ("adapter_len", "adapter_layers"):
            if getattr(config, name) is None:
                raise ConfigError(f"AdaptionPromptConfig.{name} is None; set it to a number of at least 1.")
        model_type = getattr(getattr(self.model, "config", None), "model_type", "custom")
        if model_type not in ATTENTION_NAMES:
            raise ConfigError(
                f"Adaption prompts need to know the attention of the model: they know that of "
                f"{', '.join(ATTENTION_NAMES)}, not of {model_type!r}."
            )
        super().prepare_config(config)

    def _add_to_targets(self, name, config, state_dict, how):
        """To the last layers only; target_modules is a name here, no regex."""
        names = match.Names([config.target_modules])
        found = [target for target in match.walk(self.model) if names.match(target[0])]
        if not found:
            raise NoMatchingPeftModuleError(f"Target modules {config.target_modules!r} not found in the base model.")
        if config.adapter_layers > len(found):
            raise ConfigError(
                f"adapter_layers={config.adapter_layers} is more than the {len(found)} modules that the model has "
                f"under the name {config.target_modules!r}."
            )
        for key, path, module in found[-config.adapter_layers :]:
            self._layer_at(path, module).add_adapter(name, config, key, **how)


register("ADAPTION_PROMPT", AdaptionPromptConfig, tuner=AdaptionPromptModel, prefix="adaption_prompt_")
