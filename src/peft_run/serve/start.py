"""A service from the options of the command line: the base model is read once, every run and adapter beside it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from peft_run import artefact, base
from peft_run.config import Recipe, build
from peft_run.errors import UsageError
from peft_run.run import Run
from peft_run.serve.service import Limits, Service
from peft_run.train.adapter import FULL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make_service(args: argparse.Namespace, key: str | None) -> Service:
    runs = [Run.open(path) for path in args.runs]
    for run in runs:
        info = run.read_json(artefact.FILE)
        if info is None:
            raise UsageError("artefact.unfinished", path=run.path)
        if info["method"] == FULL:
            raise UsageError("serve.full_run", run=run.path)
        if info["base_config"] != runs[0].read_json(artefact.FILE)["base_config"]:
            raise UsageError("serve.other_base", run=run.path)
    pairs = dict(pair(given) for given in args.adapter)
    recipe, tokenizer = base_of(runs, args)
    device = base.device_of(recipe)
    base.quietly()
    dtype = base.dtype_of(recipe, device)
    model = base.load_base(recipe, "AutoModelForCausalLM", dtype)
    name = args.served_name or Path(recipe.model.path).name
    service = Service(name, model, tokenizer, limits_of(args, key))
    for run in runs:
        pairs.setdefault(run.recipe.output.name or run.path.name, run.path)
    for given, path in pairs.items():
        service.offer(given, Path(path), pinned=given in args.pin)
    for problem in service.recall():
        args.console.warn("serve.lost", problem=problem)
    return service


def base_of(runs: list[Run], args: argparse.Namespace) -> tuple[Recipe, PreTrainedTokenizerBase]:
    """The recipe that names the base, and the tokenizer; a run's own has the template that it was trained with."""
    if runs:
        from transformers import AutoTokenizer

        recipe = runs[0].recipe
        tokenizer = AutoTokenizer.from_pretrained(str(runs[0].path), padding_side="right")
        dtype = runs[0].read_json(artefact.FILE)["dtype"]
        recipe.model.dtype = next((ours for ours, theirs in base.DTYPES.items() if theirs == dtype), "auto")
        if args.base:
            recipe.model.path = str(Path(args.base).absolute()) if Path(args.base).is_dir() else args.base
    elif args.base:
        recipe = build({"model": {"path": args.base}}, Path.cwd())
        tokenizer = base.load_tokenizer(recipe)
        from peft_run.data.render import Renderer

        Renderer.of(recipe, tokenizer)  # a template for those without
    else:
        raise UsageError("serve.nothing")
    recipe.model.device = args.device
    if args.dtype != "auto":
        recipe.model.dtype = args.dtype
    return recipe, tokenizer


def limits_of(args: argparse.Namespace, key: str | None) -> Limits:
    return Limits(
        slots=args.slots,
        queue=args.queue,
        tokens=args.max_tokens,
        seconds=args.timeout,
        adapters=None if args.adapter_memory is None else args.adapter_memory << 20,
        key=key,
        folder=None if args.allow_runtime_lora is None else Path(args.allow_runtime_lora),
        state=None if args.state is None else Path(args.state),
    )


def pair(given: str) -> tuple[str, str]:
    name, equals, path = given.partition("=")
    if not (name and equals and path):
        raise UsageError("serve.bad_pair", given=given)
    return name, path
