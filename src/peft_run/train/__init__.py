"""Training: `train(run, recipe, console)` is the stage, the other files are its parts."""

from peft_run.train.stage import train

__all__ = ["train"]
