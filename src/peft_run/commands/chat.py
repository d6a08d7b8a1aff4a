"""`peft chat`."""

from __future__ import annotations

import argparse

HELP = {"en": "talk to a tuned model, beside its base if you like", "zh": "与微调后的模型对话，可同时对比基座"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run, or the folder of an experiment (its latest run)")
    parser.add_argument("--compare", action="store_true", help="show what the base model answers, too")
    parser.add_argument("--system", help="a system text; that of the training data if not given")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: always the likeliest token")


def main(args: argparse.Namespace) -> int:
    from peft_run import artefact
    from peft_run.chat import Chat, talk
    from peft_run.config.schema import GENERATIVE
    from peft_run.errors import UsageError
    from peft_run.run import Run

    run = Run.open(args.run)
    if run.recipe.task not in GENERATIVE:
        raise UsageError("deploy.generative_only", what="chat", task=run.recipe.task)
    chat = Chat(artefact.load(run), args.system, args.max_new_tokens, args.temperature)
    talk(chat, args.console, compare=args.compare)
    return 0
