"""Poly, Wx + b + BAx/r: A and B are mixed from LoRA skills as a sample's task says (arXiv 2202.13914, 2211.03831)."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn

from peft.config import ModulesConfig
from peft.core.adapter import Adapter, Mod, Param, Val
from peft.core.declare import layer_class
from peft.core.defaults import LORA_TARGETS
from peft.core.tuner import Tuner
from peft.core.validate import check_range
from peft.enums import PeftType
from peft.errors import AdapterError, ConfigError
from peft.registry import register


@dataclass
class PolyConfig(ModulesConfig):
    """Poly on linear layers; with n_splits, multi-head routing. Wrong values raise ConfigError, naming the field."""

    METHOD: ClassVar = PeftType.POLY

    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "names, name endings or one regex of modules that stay as they are"}
    )
    r: int = field(default=8, metadata={"help": "rank of each skill"})
    poly_type: Literal["poly"] = field(default="poly", metadata={"help": "how skills are chosen: by task"})
    n_tasks: int = field(default=1, metadata={"help": "number of tasks; task_ids are below it"})
    n_skills: int = field(default=4, metadata={"help": "number of skills that the tasks share"})
    n_splits: int = field(default=1, metadata={"help": "parts of the features that choose their skills separately"})
    init_weights: bool = field(default=True, metadata={"help": "start as the base model (B = 0), else at random"})

    def __post_init__(self):
        super().__post_init__()
        for name in ("r", "n_tasks", "n_skills", "n_splits"):
            check_range(self, name, 1)


class PolyRouter(nn.Module):
    """How much of each skill a task takes, in each split; a relaxed yes or no, drawn anew in training."""

    def __init__(self, n_tasks, n_splits, n_skills, **where):
        super().__init__()
        self.n_splits, self.n_skills = n_splits, n_skills
        self.module_logits = nn.Parameter(torch.empty(n_tasks, n_splits * n_skills, **where))

    def forward(self, task_ids):
        """(samples,) -> (samples, splits, skills), which add up to one over the skills."""
        logits = self.module_logits[task_ids].view(-1, self.n_splits, self.n_skills)
        if self.training:
            noise = torch.rand(logits.shape, dtype=logits.dtype, device=logits.device)
            logits = logits + torch.logit(noise, eps=torch.finfo(logits.dtype).eps)
        chosen = logits.sigmoid()
        return chosen / (chosen.sum(-1, keepdim=True) + 1e-12)


class Poly(Adapter):
    """y + x·A·B / r, where each sample has its own A (in, r) and B (r, out)."""

    prefix = "poly_"
    folds = False

    poly_router = Mod()
    poly_lora_A, poly_lora_B = Param(), Param()  # (splits, skills, in / splits, r), (splits, skills, r, out / splits)
    r, n_tasks, n_skills, n_splits, poly_type = Val(), Val(), Val(), Val(), Val()

    def build(self, c, where):
        out, inp = self.layer.shape
        if out % c.n_splits or inp % c.n_splits:
            raise ConfigError(
                f"PolyConfig.n_splits={c.n_splits} must divide the {inp} inputs and {out} outputs of {self.key}. "
                "Choose another number, or take the layer out of target_modules."
            )
        self.r, self.n_tasks, self.n_skills, self.n_splits = c.r, c.n_tasks, c.n_skills, c.n_splits
        self.poly_type = c.poly_type
        self.poly_router = PolyRouter(c.n_tasks, c.n_splits, c.n_skills, **where)
        self.poly_lora_A = nn.Parameter(torch.empty(c.n_splits, c.n_skills, inp // c.n_splits, c.r, **where))
        self.poly_lora_B = nn.Parameter(torch.empty(c.n_splits, c.n_skills, c.r, out // c.n_splits, **where))

    def reset(self, c):
        _like_linear(self.poly_lora_A)
        if c.init_weights:
            self.poly_lora_B.zero_()
        else:
            _like_linear(self.poly_lora_B)
        self.poly_router.module_logits.uniform_(-1e-3, 1e-3)

    def output(self, x, y):
        mix = self.poly_router(self._tasks(len(x)))
        A = torch.einsum("bqs,qsdr->bqdr", mix, self.poly_lora_A).flatten(1, 2)
        B = torch.einsum("bqs,qsrd->brqd", mix, self.poly_lora_B).flatten(2)
        # Beams, and sequences laid end to end, are further rows of their sample.
        h = torch.bmm(x.reshape(len(A), -1, x.shape[-1]), A.to(x.dtype)).to(y.dtype)
        return torch.baddbmm(y.reshape(len(B), -1, y.shape[-1]), h, B.to(y.dtype), alpha=1 / self.r).view(y.shape)

    def beside(self, x, y, y0):
        return self.output(x, y)

    def _tasks(self, rows):
        """The task of each sample that this adapter acts on; raises AdapterError where the call does not tell."""
        call = self.layer.state.call()
        if call is None or "task_ids" not in call.arguments:
            raise AdapterError(
                "task_ids is missing: Poly mixes its skills for the task of each sample. Pass task_ids=..., one task a "
                "sample, to forward or generate of the PeftModel."
            )
        tasks, last = call.arguments["task_ids"], call.arguments["last_task"]
        if last >= self.n_tasks:
            raise AdapterError(f"task_ids has the task {last}, but adapter {self.name!r} was made for {self.n_tasks}.")
        if call.names is not None and len(tasks) > 1:
            tasks = tasks[[i for i, name in enumerate(call.names) if name == self.name]]
        if rows % len(tasks):
            raise AdapterError(
                f"task_ids has {len(tasks)} tasks for {rows} rows of {self.key}: one a sample is needed."
            )
        return tasks.to(self.poly_lora_A.device)


def _like_linear(skills):
    """Fill (splits, skills, a, b) with what nn.Linear(a, b) starts with, in upstream's order of drawing."""
    splits, count, a, b = skills.shape
    drawn = torch.empty(count, splits, b, a).uniform_(-(a**-0.5), a**-0.5)
    skills.copy_(drawn.permute(1, 0, 3, 2))


PolyLayer = layer_class("PolyLayer", Poly)


class PolyModel(Tuner):
    """A model with Poly adapters; its forward and generate take task_ids, one task a sample."""

    layer_cls = PolyLayer
    target_module_mapping = LORA_TARGETS

    def call_arguments(self, args, kwargs):
        task_ids = kwargs.pop("task_ids", None)
        if task_ids is None:
            return {}
        tasks = torch.as_tensor(task_ids).flatten()
        if tasks.is_floating_point() or not len(tasks):
            raise AdapterError(f"task_ids must be whole numbers, one a sample, got {task_ids!r}.")
        low, last = (0, 0) if torch.compiler.is_compiling() else (int(tasks.min()), int(tasks.max()))
        if low < 0:
            raise AdapterError(f"task_ids must be at least 0, got {low}.")
        return {"task_ids": tasks, "last_task": last}


register("POLY", PolyConfig, tuner=PolyModel, prefix="poly_")
