"""The tuned model, and the base that it is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from peft_run import artefact, base
from peft_run.config.schema import HEADS
from peft_run.train.adapter import FULL

if TYPE_CHECKING:
    from torch import nn

    from peft_run.artefact import Tuned

OFF = "adapter_off"  # the same model without its adapter
UNTRAINED = "untrained_head"  # the same, and the output layer that training began with
SEPARATE = "separate"  # the base, loaded beside a model of which every weight was trained


class Sides:
    """`with sides.on("base") as model:` gives the model of a side. `names` are those there are, tuned first."""

    def __init__(self, tuned: Tuned, *, with_base: bool) -> None:
        self.tuned = tuned
        self.kind: str | None = None
        self.plain: nn.Module | None = None
        heads = tuned.recipe.task in HEADS
        if with_base and tuned.info["method"] != FULL:
            self.kind = UNTRAINED if heads else OFF
        elif with_base and not heads:
            self.kind = SEPARATE
            self.plain = load_beside(tuned)
        self.names = ("tuned", "base") if self.kind else ("tuned",)

    @contextmanager
    def on(self, side: str) -> Iterator[nn.Module]:
        if side == "tuned":
            yield self.tuned.model
        elif self.plain is not None:
            yield self.plain
        else:
            with self.tuned.model.disable_adapter():
                yield self.tuned.model


def load_beside(tuned: Tuned) -> nn.Module:
    recipe = tuned.recipe
    dtype = base.dtype_named(tuned.info["dtype"])
    plain = base.load_base(recipe, tuned.task.auto_class, dtype, **tuned.task.model_settings())
    artefact.settle(plain, tuned.tokenizer)
    return plain.eval()
