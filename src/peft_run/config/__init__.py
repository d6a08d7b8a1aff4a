"""Recipes: their fields, their files and their help."""

from peft_run.config.load import build, dump, load
from peft_run.config.schema import Recipe, Source

__all__ = ["Recipe", "Source", "build", "dump", "load"]
