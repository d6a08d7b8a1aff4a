"""Upstream PEFT's module paths, made importable. The rows are in `compat_table`; nothing in the house imports either.

A legacy module holds no code: each of its names is fetched from its home when it is first read.
"""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec


class _LegacyModules(MetaPathFinder, Loader):
    """Asked only for modules that no file holds."""

    def find_spec(self, fullname, path=None, target=None):
        if not fullname.startswith("peft."):
            return None
        from peft.compat_table import ALIASES

        known = fullname.removeprefix("peft.") in ALIASES
        return ModuleSpec(fullname, self, is_package=True) if known else None

    def exec_module(self, module):
        from peft.compat_table import ALIASES, rows

        full = module.__name__
        names = rows(full.removeprefix("peft."))

        def fetch(name):
            if name in names:
                home, real = names[name]
                value = getattr(importlib.import_module(f"peft.{home}"), real)
            elif f"{full}.{name}".removeprefix("peft.") in ALIASES:
                value = importlib.import_module(f"{full}.{name}")
            else:
                raise AttributeError(f"module {full!r} has no attribute {name!r}")
            setattr(module, name, value)
            return value

        module.__getattr__ = fetch
        module.__dir__ = lambda: sorted({*vars(module), *names})
        module.__all__ = list(names)


def install():
    """Make the legacy paths importable."""
    if not any(isinstance(finder, _LegacyModules) for finder in sys.meta_path):
        sys.meta_path.append(_LegacyModules())
