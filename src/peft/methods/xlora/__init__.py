"""X-LoRA, W + Σᵢ gᵢ·sᵢ·BᵢAᵢ: LoRA experts that a trained network weighs for each token (arXiv 2402.07148)."""

from peft.methods.xlora.classifier import XLoraClassifier
from peft.methods.xlora.config import XLoraConfig
from peft.methods.xlora.layer import XLoraLayer
from peft.methods.xlora.model import XLoraModel
from peft.registry import register

__all__ = ["XLoraClassifier", "XLoraConfig", "XLoraLayer", "XLoraModel"]

register("XLORA", XLoraConfig, tuner=XLoraModel, prefix="xlora_")
