"""The one table of methods. A method file calls `register`; everything else looks here.

A built-in method is imported when its name is first asked for, so that `import peft` loads none of them.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass

from peft.enums import PeftType

BUILT_IN = {  # peft_type -> the file that registers it
    "LORA": "peft.methods.lora.model",
    "TRAINABLE_TOKENS": "peft.methods.trainable_tokens",
    "PREFIX_TUNING": "peft.prompts.prefix",
    "PROMPT_TUNING": "peft.prompts.prompt_tuning",
    "P_TUNING": "peft.prompts.p_tuning",
    "MULTITASK_PROMPT_TUNING": "peft.prompts.multitask",
    "CPT": "peft.prompts.cpt",
    "CARTRIDGE": "peft.prompts.cartridge",
    "ADALORA": "peft.methods.adalora",
    "ADAMSS": "peft.methods.adamss",
    "ADAPTION_PROMPT": "peft.methods.adaption_prompt",
    "BEFT": "peft.methods.beft",
    "BOFT": "peft.methods.boft",
    "BOTTLENECK": "peft.methods.bottleneck",
    "C3A": "peft.methods.c3a",
    "DEFT": "peft.methods.deft",
    "DELORA": "peft.methods.delora",
    "FOURIERFT": "peft.methods.fourierft",
    "FROD": "peft.methods.frod",
    "FUSION": "peft.methods.fusion",
    "GLORA": "peft.methods.glora",
    "GRALORA": "peft.methods.gralora",
    "HIRA": "peft.methods.hira",
    "HRA": "peft.methods.hra",
    "IA3": "peft.methods.ia3",
    "LILY": "peft.methods.lily",
    "LN_TUNING": "peft.methods.ln_tuning",
    "LOHA": "peft.methods.loha",
    "LOKR": "peft.methods.lokr",
    "MISS": "peft.methods.miss",
    "OFT": "peft.methods.oft",
    "OSF": "peft.methods.osf",
    "PEANUT": "peft.methods.peanut",
    "POLY": "peft.methods.poly",
    "PSOFT": "peft.methods.psoft",
    "PVERA": "peft.methods.pvera",
    "RANDLORA": "peft.methods.randlora",
    "REFT": "peft.methods.reft",
    "ROAD": "peft.methods.road",
    "SHADOW": "peft.methods.shadow",
    "SHIRA": "peft.methods.shira",
    "SUPERTUNING": "peft.methods.supertuning",
    "TINYLORA": "peft.methods.tinylora",
    "UNILORA": "peft.methods.unilora",
    "VBLORA": "peft.methods.vblora",
    "VERA": "peft.methods.vera",
    "WAVEFT": "peft.methods.waveft",
    "XLORA": "peft.methods.xlora",
}


@dataclass(frozen=True)
class Method:
    """One tuning method: its name, config class, tuner class and file prefix."""

    name: str  # the peft_type in adapter_config.json
    config: type
    tuner: type | None  # the model-level class; None for methods that adapt the inputs, not the layers
    prefix: str  # its parameters' names begin with this
    encoder: type | None = None  # prompt methods: the module that makes the prompt
    mixed: bool = False  # may share a PeftMixedModel with other methods


_METHODS: dict[str, Method] = {}


def register(name, config, *, tuner=None, encoder=None, prefix="", mixed=False):
    """Add a method. Raises KeyError if the name or the prefix is taken; a tuner may share that of its base class."""
    if name in _METHODS:
        raise KeyError(f"There is already a method called {name!r}.")
    owner = next((m for m in _METHODS.values() if prefix and m.prefix == prefix), None)
    if owner is not None and not (tuner and owner.tuner and issubclass(tuner, owner.tuner)):
        raise KeyError(f"The prefix {prefix!r} of {name} is already used by {owner.name}.")
    _METHODS[name] = Method(name, config, tuner, prefix, encoder, mixed)


def method(peft_type):
    """The `Method` registered for a PeftType or its name. Raises ValueError for an unknown one."""
    name = getattr(peft_type, "value", peft_type)
    name = name if isinstance(name, str) else repr(name)
    if name not in _METHODS and name in BUILT_IN:
        importlib.import_module(BUILT_IN[name])
    if name not in _METHODS:
        raise ValueError(f"Unknown peft_type {name!r}. This version of peft knows: {', '.join(sorted(names()))}.")
    return _METHODS[name]


def loaded():
    """The methods that were asked for, or registered from outside, so far."""
    return list(_METHODS.values())


def names():
    """All known method names, imported or not."""
    return {*BUILT_IN, *_METHODS}


def register_peft_method(*, name, config_cls, model_cls, prefix=None, is_mixed_compatible=False):
    """Add a third-party method under upstream's calling convention.

    name: lower case, its upper case must be a member of PeftType. Raises ValueError, or KeyError if taken.
    """
    if name.lower() != name:
        raise ValueError(f"The name of a method must be lower case, got {name!r}.")
    if name.upper() not in PeftType.__members__:
        raise ValueError(f"{name.upper()!r} is not a member of PeftType; add it there first.")
    if name.upper() in BUILT_IN:
        raise KeyError(f"There is already a method called {name.upper()!r}.")
    register(name.upper(), config_cls, tuner=model_cls, prefix=prefix or f"{name}_", mixed=is_mixed_compatible)


class MethodView(Mapping):
    """A read-only dict {PeftType: one attribute of its Method}, for methods that have it."""

    def __init__(self, attribute, only=lambda m: True):
        self.attribute, self.only = attribute, only

    def _has(self, name):
        m = method(name)
        return getattr(m, self.attribute) is not None and self.only(m)

    def __getitem__(self, peft_type):
        name = getattr(peft_type, "value", peft_type)
        if name not in names() or not self._has(name):
            raise KeyError(peft_type)
        return getattr(method(name), self.attribute)

    def __iter__(self):
        return (PeftType(n) if n in PeftType.__members__ else n for n in sorted(names()) if self._has(n))

    def __len__(self):
        return sum(1 for _ in self)


PEFT_TYPE_TO_CONFIG_MAPPING = MethodView("config")
PEFT_TYPE_TO_TUNER_MAPPING = MethodView("tuner")
PEFT_TYPE_TO_MIXED_MODEL_MAPPING = MethodView("tuner", only=lambda m: m.mixed)
PEFT_TYPE_TO_PREFIX_MAPPING = MethodView("prefix")
