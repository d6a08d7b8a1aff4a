"""Classes that stand for a variant of LoRA on one kind of layer, like upstream's `DoraLinearVariant`, for isinstance.

What `layer.lora_variant["default"]` holds is the adapter itself.
"""

import functools
import re

KINDS = {"linear": "Linear", "embedding": "Embedding"}


def title(adapter):
    """The name of the class for an adapter, None for one of plain LoRA."""
    name = {"QaLora": "QALora"}.get(type(adapter).__name__, type(adapter).__name__)
    if name == "Lora":
        name = "Dora" if adapter.use_dora else "MiCA" if adapter.mode == "mica" else None
    kind = KINDS.get(adapter.kind.name) or f"Conv{adapter.kind.spatial}d"
    return name and f"{name}{kind}Variant"


class Variant(type):
    """The type of these classes."""

    def __instancecheck__(cls, adapter):
        from peft.methods.lora.lora import Lora

        return isinstance(adapter, Lora) and title(adapter) == cls.__name__


def __getattr__(name):
    return _made(name)


@functools.cache
def _made(name):
    if not re.fullmatch(r"[A-Z][A-Za-z]+(Linear|Embedding|Conv[123]d)Variant", name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return Variant(name, (), {"__module__": __name__, "__doc__": "A variant of LoRA on one kind of layer."})
