"""`peft demo`."""

from peft_run.demo import add_options as add_arguments
from peft_run.demo import run as main

HELP = {
    "en": "fine-tune a small real model on this machine and show what changed",
    "zh": "在本机微调一个真实的小模型，并展示变化",
}

__all__ = ["HELP", "add_arguments", "main"]
