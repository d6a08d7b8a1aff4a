"""Parameter-efficient fine-tuning: adapt a large frozen model by training a small part of it.

Every public name is imported when it is first used, so `import peft` costs little more than `import torch`.
"""

import importlib

from peft import compat
from peft.surface import HOME_OF
from peft.version import __version__

__all__ = ["__version__", *sorted(HOME_OF)]


def __getattr__(name):
    if name in HOME_OF:
        value = globals()[name] = getattr(importlib.import_module(f"peft.{HOME_OF[name]}"), name)
        return value
    try:
        return importlib.import_module(f"peft.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"peft.{name}":
            raise
        raise AttributeError(f"module 'peft' has no attribute {name!r}") from None


def __dir__():
    return sorted({*__all__, *globals()})


compat.install()
