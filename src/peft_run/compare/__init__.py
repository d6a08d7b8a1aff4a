"""Runs side by side: `from peft_run.compare import compare`."""

from peft_run.compare.collect import compare

__all__ = ["compare"]
