"""LN tuning: norms, or any modules, are trained whole, each adapter its own copy of them (arXiv 2312.11420)."""

import copy
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from peft.config import ModulesConfig
from peft.core.adapter import Adapter, Mod
from peft.core.declare import layer_class, tuner_class
from peft.core.defaults import LN_TUNING_TARGETS
from peft.core.wrappers import on_meta
from peft.enums import PeftType
from peft.errors import ConfigError
from peft.layers.whole import places
from peft.registry import register


@dataclass
class LNTuningConfig(ModulesConfig):
    """Which modules are trained whole; by default the norms of the model type."""

    METHOD: ClassVar = PeftType.LN_TUNING

    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "names, name endings or one regex of modules that stay as they are"}
    )


class LNTuning(Adapter):
    """A copy of the module, in the module's own dtype."""

    prefix = "ln_tuning_"
    kinds = ("whole",)

    ln_tuning_layers = Mod()

    def build(self, c, where):
        if fixed := [n for n, p in self.base.named_parameters() if not p.is_floating_point()]:
            raise ConfigError(f"{self.key} cannot be trained whole: its {fixed[0]} is quantized. Target other modules.")
        empty = torch.device(where["device"]).type == "meta"
        self.ln_tuning_layers = on_meta(self.base) if empty else copy.deepcopy(self.base)

    def reset(self, c):
        pristine = self.kind.pristine(self.layer)
        for path, (owner, name) in places(self.ln_tuning_layers).items():
            owner[name].copy_(pristine[path])

    def module(self):
        return self.ln_tuning_layers

    # Upstream's files keep the adapter's name in the keys of modules within modules; it is no part of what they say.
    @classmethod
    def file_key(cls, key, name):
        field_name, _, rest = key.partition(".")
        inner = rest.removeprefix(f"{name}.")
        return key if "." in inner else f"{field_name}.{inner}"

    @classmethod
    def from_file(cls, c, tensors, adapters):
        def renamed(key):
            head, field_name, rest = key.partition(".ln_tuning_layers.")
            path = rest.partition(".")[2]
            return f"{head}{field_name}{adapters[0].name}.{path}" if "." in path else key

        return {renamed(k): t for k, t in tensors.items()}


LNTuningLayer = layer_class("LNTuningLayer", LNTuning)
LNTuningModel = tuner_class("LNTuningModel", LNTuningLayer, LN_TUNING_TARGETS)
register("LN_TUNING", LNTuningConfig, tuner=LNTuningModel, prefix="ln_tuning_")
