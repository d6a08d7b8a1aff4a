"""Import paths of upstream PEFT that other libraries use, in one table: legacy module -> {name: home}.

Nothing in the house imports this. Delete a row when its last user is gone. `OfKind` stands for upstream's classes per
layer type: isinstance(m, peft.tuners.lora.Linear) is true for a LoRA layer on a linear base layer.
"""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

ALIASES = {
    "tuners": {
        "LoraConfig": "methods.lora.config:LoraConfig",
        "LoraModel": "methods.lora.lora:LoraModel",
    },
    "tuners.tuners_utils": {
        "BaseTuner": "core.tuner:Tuner",
        "BaseTunerLayer": "core.layer:AdapterLayer",
    },
    "tuners.lora": {
        "LoraConfig": "methods.lora.config:LoraConfig",
        "LoraLayer": "methods.lora.lora:LoraLayer",
        "LoraModel": "methods.lora.lora:LoraModel",
    },
    "tuners.lora.layer": {"LoraLayer": "methods.lora.lora:LoraLayer"},
    "utils": {
        "ModulesToSaveWrapper": "core.wrappers:ModulesToSaveWrapper",
        "get_peft_model_state_dict": "core.checkpoint:get_peft_model_state_dict",
    },
    "utils.other": {
        "AuxiliaryTrainingWrapper": "core.wrappers:AuxiliaryTrainingWrapper",
        "ModulesToSaveWrapper": "core.wrappers:ModulesToSaveWrapper",
    },
    "peft_model": {"PeftModel": "model:PeftModel"},
}


class _LegacyModules(MetaPathFinder, Loader):
    def find_spec(self, fullname, path=None, target=None):
        package, _, short = fullname.partition(".")
        return ModuleSpec(fullname, self, is_package=True) if package == "peft" and short in ALIASES else None

    def exec_module(self, module):
        names = ALIASES[module.__name__.removeprefix("peft.")]

        def resolve(name):
            if name not in names:
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            home = names[name]
            if isinstance(home, OfKind):
                value = home
            else:
                home, _, real = home.partition(":")
                value = getattr(importlib.import_module(f"peft.{home}"), real or name)
            setattr(module, name, value)
            return value

        module.__getattr__ = resolve
        module.__all__ = list(names)


class OfKind(type):
    """A class whose instances are layers of one method on one kind of base layer; calling it makes one."""


def install():
    """Make the legacy paths importable."""
    if not any(isinstance(finder, _LegacyModules) for finder in sys.meta_path):
        sys.meta_path.append(_LegacyModules())
