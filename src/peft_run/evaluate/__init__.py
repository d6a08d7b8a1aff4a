"""Base against tuned, with intervals: `from peft_run.evaluate import evaluate`."""

from peft_run.evaluate.stage import evaluate

__all__ = ["evaluate"]
