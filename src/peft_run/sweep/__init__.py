"""`peft sweep`: many recipes that differ along a few axes, each a run, and what came of them."""

from peft_run.sweep.settings import Settings
from peft_run.sweep.stage import resume, start

__all__ = ["Settings", "resume", "start"]
