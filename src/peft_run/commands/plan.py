"""`peft plan`: what a training would take of memory and time, before anything is loaded."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import Plan
    from peft_run.config import Recipe

HELP = {"en": "estimate memory before training, and what would fit", "zh": "训练前估算内存，并给出可行的方案"}
ALIASES = ("estimate",)
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "evaluation", "peak")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE|MODEL", help="a recipe file, or a model: a folder or a hub id")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the recipe")
    parser.add_argument("--method", help="the tuning method: adapter.method")
    parser.add_argument("--memory", metavar="SIZE", help="such as 7GiB; default: what is free on the GPU or machine")
    parser.add_argument("--probe", action="store_true", help="take two real steps, and measure time and memory")
    parser.set_defaults(free_options=True)


def main(args: argparse.Namespace) -> int:
    from peft_run import base, memory
    from peft_run.console import print_json
    from peft_run.plan.batches import of_recipe
    from peft_run.plan.check import refusal
    from peft_run.plan.probe import probe
    from peft_run.plan.recipe import own, plan, variants, verdict

    recipe = recipe_of(args)
    base.quietly()
    batches = of_recipe(recipe)
    room = memory.room(base.device_of(recipe), args.memory or recipe.train.max_memory)
    mine = plan(recipe, batches)
    plans = {name: mine if name == own(recipe) else plan(other, batches) for name, other in variants(recipe).items()}
    limit = longest_input(recipe)
    found: dict[str, Any] = {
        "method": own(recipe),
        "batch": mine.batch,
        "length": mine.length,
        "room": room,
        "verdict": verdict(mine.peak, room),
        "trained": mine.trained,
        "total": mine.total,
        "trainable": [vars(group) for group in mine.trainable],
        "plans": {name: {part: getattr(other, part) for part in PARTS} for name, other in plans.items()},
        "largest": {"batch": mine.largest("batch", room), "length": mine.largest("length", room, limit)},
    }
    error = None
    if found["verdict"] == "exceeds":
        error = refusal(recipe, batches, mine.peak, room, args.lang)
        found["remedies"] = error.remedies  # type: ignore[attr-defined]
    elif args.probe:
        found["probe"] = probe(recipe, args.console)
    if args.json:
        print_json(found)
    else:
        show(found, mine, args)
    if error is not None:
        raise error
    return 0


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe with its changes; a model alone makes one of defaults."""
    from peft_run.config import load
    from peft_run.options import RECIPES

    overrides = [*args.overrides, *args.free]
    if args.method:
        overrides.append(f"adapter.method={args.method}")
    if args.recipe.endswith(RECIPES):
        return load(args.recipe, overrides)
    return load(None, [f"model.path={args.recipe}", *overrides])


def longest_input(recipe: Recipe) -> int:
    """The positions that the model knows."""
    import transformers

    from peft_run import base

    config = base.fetch(transformers.AutoConfig, base.find(recipe), recipe).get_text_config()
    return getattr(config, "max_position_embeddings", None) or 1 << 17


def show(found: dict[str, Any], mine: Plan, args: argparse.Namespace) -> None:
    from peft_run.columns import columns
    from peft_run.memory import shown
    from peft_run.messages import sentence

    def say(key: str, **values: object) -> str:
        return sentence(f"plan.{key}", args.lang, **values)

    share = mine.trained / mine.total
    print(say("trains", trained=mine.trained, total=mine.total, share=share))
    header = [say("kind"), say("where"), say("tensors"), say("numbers")]
    kinds = {"method": "method", "head": "head", "token rows": "token_rows", "weights": "base"}
    rows = [[say(kinds[g.kind]), g.name, f"{g.tensors:,}", f"{g.numbers:,}"] for g in mine.trainable]
    print(columns([header, *rows]) + "\n")
    print(say("memory", batch=mine.batch, length=mine.length))
    names = list(found["plans"])
    header = ["", *(f"{name} *" if name == found["method"] else name for name in names)]
    rows = [[say(part), *(shown(found["plans"][name][part]) for name in names)] for part in PARTS]
    print(columns([header, *rows]) + "\n")
    print(say("largest", room=shown(max(0, found["room"])), **found["largest"]))
    if "probe" in found:
        measured = found["probe"]
        print(say("probe", **{**measured, "peak": shown(measured["peak"]), "planned": shown(mine.peak)}))
        print(say("time", steps=measured["steps"], minutes=measured["seconds"] / 60))
    if found["verdict"] != "exceeds":
        print(say(found["verdict"], peak=shown(mine.peak), room=shown(found["room"])))
