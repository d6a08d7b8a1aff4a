"""Upstream's LoRA classes per kind of base layer, for isinstance and for adapting a single layer by hand."""

from peft.core.of_kind import OfKind
from peft.methods.lora.config import LoraConfig
from peft.methods.lora.lora import LoraLayer


class Linear(LoraLayer, metaclass=OfKind, kind="linear", config=LoraConfig):
    """LoRA on nn.Linear or transformers' Conv1D: Linear(base_layer, adapter_name, config, r=..., lora_alpha=...)."""


class Embedding(LoraLayer, metaclass=OfKind, kind="embedding", config=LoraConfig):
    """LoRA on nn.Embedding."""


class _ConvNd(LoraLayer, metaclass=OfKind, kind="conv", config=LoraConfig):
    """LoRA on a convolution."""


class Conv1d(LoraLayer, metaclass=OfKind, kind="conv", spatial=1, config=LoraConfig):
    """LoRA on nn.Conv1d."""


class Conv2d(LoraLayer, metaclass=OfKind, kind="conv", spatial=2, config=LoraConfig):
    """LoRA on nn.Conv2d."""


class Conv3d(LoraLayer, metaclass=OfKind, kind="conv", spatial=3, config=LoraConfig):
    """LoRA on nn.Conv3d."""


class MultiheadAttention(LoraLayer, metaclass=OfKind, kind="mha", config=LoraConfig):
    """LoRA on nn.MultiheadAttention."""


class ParamWrapper(LoraLayer, metaclass=OfKind, kind="param", config=LoraConfig):
    """LoRA on a bare parameter, named by `parameter_name=`."""
