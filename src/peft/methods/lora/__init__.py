"""LoRA, its variants and its tools."""
