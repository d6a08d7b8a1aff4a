"""Bottleneck adapters: y + U f(D y), small networks after or beside the parts of a block (arXiv 1902.00751)."""

from peft.methods.bottleneck.adapter import BottleneckLayer
from peft.methods.bottleneck.config import BottleneckConfig
from peft.methods.bottleneck.model import BottleneckModel
from peft.registry import register

__all__ = ["BottleneckConfig", "BottleneckLayer", "BottleneckModel"]

register("BOTTLENECK", BottleneckConfig, tuner=BottleneckModel, prefix="bottleneck_", mixed=True)
