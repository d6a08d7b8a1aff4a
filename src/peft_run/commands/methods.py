"""`peft methods`."""

from peft_run.methods import add_options as add_arguments
from peft_run.methods import run as main

HELP = {"en": "list the tuning methods and when to use them", "zh": "列出微调方法及其适用场合"}

__all__ = ["HELP", "add_arguments", "main"]
