"""Shadow: a small backbone runs beside the model, and each block is corrected by how far the two are apart."""

from peft.methods.shadow.config import ShadowConfig
from peft.methods.shadow.layer import ShadowLayer
from peft.methods.shadow.model import ShadowModel
from peft.registry import register

__all__ = ["ShadowConfig", "ShadowLayer", "ShadowModel"]

register("SHADOW", ShadowConfig, tuner=ShadowModel, prefix="shadow_")
