"""A service from the options of the command line: the base model is read once, every run and adapter beside it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_run import artefact, base
from peft_run.config import Recipe, build
from peft_run.config.schema import HEADS
from peft_run.errors import UsageError
from peft_run.run import Run
from peft_run.serve.heads import Head, Pool
from peft_run.serve.service import Generator, Limits, Service
from peft_run.train.adapter import FULL

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

WORTHWHILE = 1.2  # how much faster packed products must be: a weight that two layers share is then kept twice


def make_service(args: argparse.Namespace, key: str | None) -> Service:
    writers, heads = runs_of(args.runs)
    pairs = dict(pair(given) for given in args.adapter)
    base.quietly()
    pool = Pool()
    service: Service
    if writers or args.base or not heads:
        service = generator(writers, pairs, args, key, alone=not heads)
        pool.share(service.model)
    else:
        if pairs or args.allow_runtime_lora:
            raise UsageError("serve.adapters_need_base")
        service = Service(limits_of(args, key))
    for run in heads:
        service.offer_head(Head(name_of(run), run, args.device, pool))
    for problem in service.recall():
        args.console.warn("serve.lost", problem=problem)
    return service


def pack(model: nn.Module, args: argparse.Namespace) -> None:
    """Bring float32 weights into the order that this CPU multiplies faster, if there is a faster one."""
    import peft
    from peft_run.precision import packing_gain

    parameter = next(model.parameters())
    if parameter.device.type != "cpu" or str(parameter.dtype) != "torch.float32":
        return
    if (gain := packing_gain()) >= WORTHWHILE and peft.pack_linears(model):
        args.console("serve.packed", gain=f"{gain:.1f}")


def runs_of(paths: list[str]) -> tuple[list[Run], list[Run]]:
    """Runs that write, which must have one base, and runs with an output layer of their own."""
    runs = [Run.open(path) for path in paths]
    found: list[tuple[Run, dict[str, Any]]] = [(run, run.read_json(artefact.FILE)) for run in runs]
    if unfinished := [run for run, info in found if info is None]:
        raise UsageError("artefact.unfinished", path=unfinished[0].path)
    writers = [(run, info) for run, info in found if info["task"] not in HEADS]
    for run, info in writers:
        if info["method"] == FULL:
            raise UsageError("serve.full_run", run=run.path)
        if info["base_config"] != writers[0][1]["base_config"]:
            raise UsageError("serve.other_base", run=run.path)
    return [run for run, _ in writers], [run for run, info in found if info["task"] in HEADS]


def generator(
    runs: list[Run], pairs: dict[str, str], args: argparse.Namespace, key: str | None, *, alone: bool
) -> Generator:
    """alone: no other model is to share this one's memory."""
    recipe, tokenizer = base_of(runs, args)
    dtype = base.dtype_of(recipe, base.device_of(recipe))
    model = base.load_base(recipe, "AutoModelForCausalLM", dtype)
    name = args.served_name or Path(recipe.model.path).name
    service = Generator(name, model, tokenizer, limits_of(args, key))
    if alone and not args.no_packing:
        pack(model, args)
    paths = {name_of(run): str(run.path) for run in runs} | pairs
    for given, path in paths.items():
        service.offer(given, Path(path), pinned=given in args.pin)
    return service


def name_of(run: Run) -> str:
    return run.recipe.output.name or run.path.name


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
        prefixes=args.prefix_memory << 20,
        key=key,
        folder=None if args.allow_runtime_lora is None else Path(args.allow_runtime_lora),
        state=None if args.state is None else Path(args.state),
    )


def pair(given: str) -> tuple[str, str]:
    name, equals, path = given.partition("=")
    if not (name and equals and path):
        raise UsageError("serve.bad_pair", given=given)
    return name, path
