"""The training stage: from a recipe to a finished run, or from an interrupted one to a finished one."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from peft_run import artefact, base, tasks
from peft_run.config import Recipe
from peft_run.console import Console, silent
from peft_run.data.dataset import Dataset, load_dataset
from peft_run.data.dataset import describe as describe_data
from peft_run.data.render import Renderer
from peft_run.environment import environment
from peft_run.errors import Interrupted, RunError, UsageError
from peft_run.interruption import interruption
from peft_run.packages import require
from peft_run.report import write_report
from peft_run.run import Run
from peft_run.train.world import World, wants_shards

if TYPE_CHECKING:
    import torch
    from torch import nn

    from peft_run.tasks.task import Task
    from peft_run.train.loop import Loop

# oneDNN keeps 1024 compiled kernels by default, one for each shape and several MB each: 300 MB more than with 64 on a
# model of 26M parameters, and no faster.
KERNELS = "64"


def train(
    run: Run,
    recipe: Recipe,
    console: Console | None = None,
    *,
    resume: bool = False,
    force: bool = False,
    world: World | None = None,
) -> dict[str, Any]:
    """Train, and leave the adapter with all that belongs to it in the run. The measures, as in metrics.json.

    world: the processes that train together; then all call this with the same recipe, and the first one writes the run.

    Raises Interrupted after Ctrl-C: the run then holds a checkpoint, and `resume=True` goes on from it. Raises
    DoesNotFit before the weights are loaded where the memory's plan says so, unless `force` is given.
    """
    console = console or silent()
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", KERNELS)
    for package in ("transformers", "rich"):
        require(package, extra="run")
    with run.working("train"):
        return work(run, recipe, console, resume, force, world or World())


def work(run: Run, recipe: Recipe, console: Console, resume: bool, force: bool, world: World) -> dict[str, Any]:
    from peft_run.plan.check import check
    from peft_run.train import checkpoint, loftq
    from peft_run.train.loop import Loop
    from peft_run.train.progress import progress

    start = time.monotonic()
    if recipe.train.threads is not None:
        import torch

        torch.set_num_threads(recipe.train.threads)
    dataset = load_dataset(recipe)
    say_data(dataset, console)
    task = make_task(recipe, dataset.labels)
    items = task.encode_all(dataset.train, console)
    held_out = task.encode_all(dataset.eval, console, training=False)
    if not force and world.size == 1:  # the plan is that of one process with the whole base
        check(recipe, task, items, held_out, console)
    model, dtype, added = make_model(run, recipe, task, len(items), console, resume)
    record(run, recipe, dataset, dtype, resume)
    shards = world.size > 1 and wants_shards(recipe)
    described = artefact.describe_base(model) if shards else None
    if world.size > 1:
        gather(model, world, shards, console)
    task.prepare(model)
    loop = Loop(run, recipe, task, model, items, held_out, dtype=dtype, added=added, console=console, world=world)
    if resume and loop.resume(checkpoint.newest(run, console) if world.main else None):
        console("train.resumed", step=loop.state.step)
    else:
        if resume:  # stopped before its first checkpoint: it begins again, and so does its log
            run.cut_log(0)
        if recipe.model.quant is not None and recipe.model.quant.loftq:
            loftq.start(loop, base.find(recipe), console)
    say_plan(loop, console)
    with interruption() as interrupted, progress(console, loop.total, loop.state.step) as shown:
        finished = loop.go(shown, interrupted)
    if not finished:
        raise Interrupted("train.interrupted", step=loop.state.step, path=run.path)
    step = loop.take_best()
    if not world.same(loop.parameters):
        raise RunError("world.differ")
    result: dict[str, Any] = {}
    if world.main:
        artefact.save(run, recipe, model, task, dtype, step, described)
        result = finish(run, loop, step, time.monotonic() - start, console)
    return world.share(result)


def gather(model: nn.Module, world: World, shards: bool, console: Console) -> None:
    """Make one model of the processes' models."""
    console("world.together", size=world.size, base=console.text("world.sharded" if shards else "world.copied"))
    if shards:
        world.shard(model)


def make_task(recipe: Recipe, labels: list[str]) -> Task:
    """The task with the base's tokenizer and the recipe's template."""
    return tasks.make(recipe, Renderer.of(recipe, base.load_tokenizer(recipe)), labels)


def make_model(
    run: Run, recipe: Recipe, task: Task, samples: int, console: Console, resume: bool
) -> tuple[nn.Module, torch.dtype, dict[str, torch.Tensor]]:
    """The wrapped model, the number format of its base (on a resume the same as before), and the method's buffers."""
    import math

    import torch

    from peft_run.train import adapter
    from peft_run.train.loop import seed_everything, total_steps

    device = base.device_of(recipe)
    before = run.read_json("env.json", {}).get("dtype") if resume else None
    dtype = base.dtype_named(before) if before else base.dtype_of(recipe, device)
    if recipe.adapter.method.upper() == adapter.FULL:
        dtype = torch.float32
    seed_everything(recipe.train.seed, -1)  # the start of new layers and of the adapter
    plain = base.load_base(recipe, task.auto_class, dtype, **task.model_settings())
    artefact.settle(plain, task.tokenizer)
    steps = total_steps(recipe, math.ceil(math.ceil(samples / recipe.train.batch) / recipe.train.accumulate))
    own = {id(tensor) for tensor in (*plain.parameters(), *plain.buffers())}
    model = adapter.wrap(plain, recipe, task.peft_type, steps)
    added = {n: b for n, b in model.named_buffers() if id(b) not in own and b.is_floating_point()}
    if recipe.train.grad_checkpoint:
        checkpoint_activations(model)
        model.enable_input_require_grads()
    console("train.model", base=recipe.model.path, dtype=str(dtype).removeprefix("torch."), device=device)
    return model, dtype, added


def checkpoint_activations(model: nn.Module) -> None:
    """Under the newer name where it is there: the older one goes in transformers 6."""
    how = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)


def record(run: Run, recipe: Recipe, dataset: Dataset, dtype: torch.dtype, resume: bool) -> None:
    """env.json. A resumed run must read the same data: anything else would be another run."""
    data = describe_data(dataset)
    before = run.read_json("env.json")
    if resume and before is not None:
        for part, files in data.items():
            old = {file["sha256"] for file in before["data"].get(part, [])}
            for file in files:
                if file["sha256"] not in old:
                    raise UsageError("train.data_changed", path=file["path"])
        return
    run.write_json("env.json", environment(recipe.train.seed, str(dtype).removeprefix("torch."), data))


def say_data(dataset: Dataset, console: Console) -> None:
    console("train.data", train=len(dataset.train), held_out=len(dataset.eval))
    for files in dataset.files.values():
        for file in files:
            mapping = ", ".join(f"{name} <- {column}" for name, column in file.mapping.items())
            console("train.file", path=file.path, format=file.format, mapping=mapping)
            if file.dropped:
                console.warn("train.dropped", path=file.path, count=file.dropped, total=file.rows)
    if dataset.leaked:
        console.warn("train.leaked", count=dataset.leaked, total=len(dataset.eval))


def say_plan(loop: Loop, console: Console) -> None:
    trainable = sum(parameter.numel() for parameter in loop.parameters.values())
    total = sum(parameter.numel() for parameter in loop.model.parameters())
    if not trainable:
        raise RunError("train.nothing_trained")
    share = trainable / total
    console("train.plan", trainable=trainable, total=total, share=share, steps=loop.total)


def finish(run: Run, loop: Loop, step: int, seconds: float, console: Console) -> dict[str, Any]:
    """The figures of the training, for metrics.json and the user."""
    from peft_run.train.loop import peak_memory

    events = run.events()
    losses = [event["loss"] for event in events if "loss" in event]
    evaluations = [event for event in events if "eval_loss" in event]
    last = next((event for event in evaluations if event["step"] == step), {})
    result = {
        "steps": loop.state.step,
        "total_steps": loop.total,
        "step_of_adapter": step,
        "stopped_early": loop.state.early,
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        **{name: value for name, value in last.items() if name.startswith("eval_")},
        "tokens": loop.state.tokens,
        "tokens_per_second": next((e["tokens_per_second"] for e in reversed(events) if "loss" in e), None),
        "peak_memory_mb": round(peak_memory(loop.device) / 1e6, 1),
        "trainable": sum(parameter.numel() for parameter in loop.parameters.values()),
        "processes": loop.world.size,
        "seconds": round(seconds, 1),
        "warnings": console.warnings,
    }
    run.add_metrics("train", result)
    if loop.recipe.track.plots:
        write_report(run, console.language)
    console("train.saved", path=run.path, step=step, seconds=seconds)
    return result
