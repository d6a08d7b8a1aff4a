"""The training loop, for every task and method.

A step is a function of its number: the order of the samples, the learning rate and the random numbers follow from the
seed and the step. So a resumed run needs the trained tensors, the optimizer's state and the few numbers of `State`.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from peft_run.train import checkpoint, optimizer, schedules, sentinel
from peft_run.train.adapter import trained
from peft_run.train.sampler import Sampler, by_length
from peft_run.train.world import World

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from peft_run.config import Recipe
    from peft_run.console import Console
    from peft_run.run import Run
    from peft_run.tasks.task import Batch, Task
    from peft_run.train.progress import Progress


class Stopped(Exception):
    """The user asked to stop, in the middle of an evaluation."""


@dataclass
class State:
    """What changes from step to step, besides tensors."""

    step: int = 0
    tokens: int = 0
    evaluated: bool = True  # whether the evaluation that is due at this step has been done
    best: float | None = None
    best_step: int | None = None
    without_progress: int = 0
    early: bool = False  # stopped because there was no more progress
    scaler: dict[str, Any] = field(default_factory=dict)


class Loop:
    def __init__(
        self,
        run: Run,
        recipe: Recipe,
        task: Task,
        model: nn.Module,
        items: Sequence[Any],
        held_out: Sequence[Any],
        *,
        dtype: torch.dtype,
        added: dict[str, torch.Tensor],
        console: Console,
        world: World | None = None,
    ) -> None:
        self.run, self.recipe, self.task, self.model, self.console = run, recipe, task, model, console
        self.items, self.held_out = items, held_out
        self.world = world or World()
        self.device = next(model.parameters()).device
        settings = recipe.train
        self.sampler = Sampler(
            [item.length for item in items],
            batch=settings.batch,
            accumulate=settings.accumulate,
            seed=settings.seed,
            grouped=settings.batching == "grouped",
        )
        self.total = total_steps(recipe, self.sampler.steps_per_epoch)
        self.eval_every = interval(settings.eval_every, self.total)
        self.save_every = interval(settings.save_every, self.total)
        self.parameters = trained(model)
        self.optimizer = optimizer.make(self.parameters, settings)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.added = added  # tensors of the method that are not trained, but may change
        self.state = State()
        self.first = True

    # -- from start to end --------------------------------------------------------------------------------------------

    def go(self, progress: Progress, interrupted: Callable[[], bool]) -> bool:
        """Train to the end. False: the user stopped it, and a checkpoint holds all there is."""
        state, interrupted = self.state, self.world.agreed(interrupted)
        self.started, self.tokens_before = time.monotonic(), state.tokens
        while state.step < self.total and not state.early:
            if state.evaluated:
                progress.step(self.step())
                state.evaluated = not self.is_due(self.eval_every)
            improved = False
            if not state.evaluated:
                try:
                    improved = self.evaluate(progress, interrupted)
                except Stopped:
                    break
            if improved or self.is_due(self.save_every) or interrupted() or state.early:
                self.save()
            if interrupted():
                break
        if state.step < self.total and not state.early:
            if not state.evaluated:
                self.save()
            return False
        return True

    def is_due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step == self.total

    # -- one step -----------------------------------------------------------------------------------------------------

    def step(self) -> dict[str, Any]:
        """One optimizer step. The loss is the mean over all units of all its batches."""
        state, settings = self.state, self.recipe.train
        begin = time.monotonic()
        world = self.world
        seed_everything(settings.seed, state.step, world.rank)
        parts = [world.part(numbers) for numbers in self.sampler.batches(state.step)]
        batches = [(self.batch(self.items, numbers), counts) for numbers, counts in parts]
        units, tokens = world.total(*(sum(b[name] * counts for b, counts in batches) for name in ("units", "tokens")))
        rate = optimizer.rate(state.step, self.total, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        loss = 0.0
        for batch, counts in batches:
            part = self.task.loss(self.model, batch) / units * counts
            (value,) = world.total(part.item())
            again = partial(self.task.loss, self.model, batch)
            sentinel.check_loss(value, state.step + 1, self.model, again)
            self.scaler.scale(part).backward()
            loss += value
        if (penalty := schedules.penalty(self.model)) is not None:
            self.scaler.scale(penalty / world.size).backward()
        world.add_gradients(self.parameters.values())
        self.scaler.unscale_(self.optimizer)
        if self.first:
            sentinel.check_first_step(loss, self.model, self.console)
            self.first = False
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), settings.clip or float("inf")).item()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        schedules.after_step(self.model, state.step)
        self.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.tokens += int(tokens)
        event = self.event(loss=loss, lr=rate, grad_norm=norm, seconds=time.monotonic() - begin)
        if state.step % self.recipe.track.log_every == 0 or state.step in (1, self.total):
            self.run.log(**event)
        return event

    def batch(self, items: Sequence[Any], numbers: Sequence[int]) -> Batch:
        return moved(self.task.collate([items[number] for number in numbers]), self.device)

    def event(self, **values: float) -> dict[str, Any]:
        state = self.state
        seconds = time.monotonic() - self.started
        speed = (state.tokens - self.tokens_before) / max(seconds, 1e-9)
        return {
            "step": state.step,
            "total": self.total,
            "epoch": round(state.step / self.sampler.steps_per_epoch, 4),
            **values,
            "tokens": state.tokens,
            "tokens_per_second": round(speed, 1),
            "memory_mb": round(peak_memory(self.device) / 1e6, 1),
        }

    # -- held-out data ------------------------------------------------------------------------------------------------

    def evaluate(self, progress: Progress, interrupted: Callable[[], bool]) -> bool:
        """Measure, log, and decide about early stopping. Whether this is the best so far."""
        state = self.state
        if not self.held_out:
            state.evaluated = True
            return False
        size = self.recipe.eval.batch
        measures = score(self.task, self.model, self.held_out, size, self.batch, interrupted, self.world)
        value = measures[self.task.better]
        settings = self.recipe.train.early_stop
        least = settings.min_change if settings is not None else 0.0
        better = state.best is None or value < state.best - least
        if better:
            state.best, state.best_step, state.without_progress = value, state.step, 0
        else:
            state.without_progress += 1
            state.early = settings is not None and state.without_progress >= settings.patience
        state.evaluated = True
        event = {"step": state.step, "total": self.total} | {f"eval_{name}": v for name, v in measures.items()}
        self.run.log(**event)
        progress.evaluated(event)
        return better and self.recipe.train.keep == "best"

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save(self) -> None:
        if not self.world.main:
            return
        state = self.state
        if self.scaler.is_enabled():
            state.scaler = self.scaler.state_dict()
        tensors, values = optimizer.state_of(self.optimizer, self.parameters)
        tensors_of_model = {**self.parameters, **self.added, **schedules.state_of(self.model)}
        checkpoint.save(self.run, state.step, tensors_of_model, tensors, {**asdict(state), "optimizer": values})
        always = [state.best_step] if state.best_step is not None and self.recipe.train.keep == "best" else []
        checkpoint.prune(self.run, self.recipe.train.save_total_limit, always)

    def resume(self, folder: Path | None) -> bool:
        """Go back to a checkpoint, bit for bit: the one that the first process has found. Whether there is one."""
        found = self.world.share(checkpoint.load(folder) if folder is not None else None)
        if found is None:  # it ended before the first one was whole
            self.run.cut_log(0)
            return False
        tensors, of_optimizer, state = found
        values = state.pop("optimizer")
        self.put(tensors)
        schedules.restore(self.model, tensors)
        optimizer.restore(self.optimizer, self.parameters, of_optimizer, values)
        self.state = State(**state)
        if self.state.scaler:
            self.scaler.load_state_dict(self.state.scaler)
        self.run.cut_log(self.state.step)
        return True

    @torch.no_grad()
    def put(self, tensors: dict[str, torch.Tensor]) -> None:
        """Set the trained tensors to those of a checkpoint."""
        for name, tensor in {**self.parameters, **self.added}.items():
            tensor.copy_(tensors[name])

    def take_best(self) -> int:
        """Put the best adapter into the model, where the recipe wants it; its step."""
        state = self.state
        if self.recipe.train.keep == "best" and state.best_step not in (None, state.step):
            folder = self.run / f"checkpoint-{state.best_step}"
            self.put(self.world.share(checkpoint.load_trained(folder) if self.world.main else None))
            return state.best_step
        return state.step


def score(
    task: Task,
    model: nn.Module,
    items: Sequence[Any],
    size: int,
    batch_of: Callable[[Sequence[Any], Sequence[int]], Batch],
    interrupted: Callable[[], bool],
    world: World,
) -> dict[str, float]:
    """The task's measures over all items, of which each process sees its share."""
    sums: dict[str, float] = {}
    model.eval()
    for numbers in by_length([item.length for item in items], size):
        if interrupted():
            raise Stopped
        with torch.no_grad():  # not inference_mode: what the library keeps for later must be usable in training
            own, counts = world.part(numbers)
            for name, value in task.score(model, batch_of(items, own)).items():
                sums[name] = sums.get(name, 0) + value * counts
    return task.summary(dict(zip(sums, world.total(*sums.values()))))


def moved(batch: Batch, device: torch.device) -> Batch:
    """All tensors of a batch on a device."""

    def move(value: Any) -> Any:
        if isinstance(value, dict):
            return moved(value, device)
        return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value

    return {name: move(value) for name, value in batch.items()}


def seed_everything(seed: int, step: int, rank: int = 0) -> None:
    """Every step begins its random numbers anew, so that no generator's state has to be kept.

    Processes that train together draw different ones; the first draws those of a process alone.
    """
    mixed = random.Random(f"{seed}-{step}" + (f"-{rank}" if rank else "")).getrandbits(63)
    random.seed(mixed)
    torch.manual_seed(mixed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(mixed % 2**32)


def total_steps(recipe: Recipe, steps_per_epoch: int) -> int:
    return recipe.train.steps or max(1, round(recipe.train.epochs * steps_per_epoch))


def interval(every: float, total: int) -> int:
    """A number of steps, from itself or from a share of all steps."""
    return max(1, round(every * total if every <= 1 else every))


def forget_peak() -> None:
    """From here on, `peak_memory` is the most from now on; the process's only where the system lets it (Linux)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def peak_memory(device: torch.device) -> int:
    """The most bytes in use so far: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
