"""Before training: refuse what the plan says cannot fit, and go on where planning itself fails."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peft_run import base, memory
from peft_run.errors import DoesNotFit, RunError

if TYPE_CHECKING:
    from peft_run.config import Recipe
    from peft_run.console import Console
    from peft_run.plan.batches import Batches
    from peft_run.tasks.task import Task

SHOWN = 3  # remedies that are looked for


def check(recipe: Recipe, task: Task, items: Sequence[Any], held_out: Sequence[Any], console: Console) -> None:
    """Raises DoesNotFit, naming changes that would fit."""
    from peft_run.plan.batches import of_items
    from peft_run.plan.recipe import plan, verdict

    try:
        batches = of_items(recipe, task, items, held_out)
        found = plan(recipe, batches)
    except RunError:
        raise
    except Exception as error:  # an exotic model: what matters is whether it trains
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        console("plan.failed", problem=problem)
        return
    room = memory.room(base.device_of(recipe), recipe.train.max_memory)
    if verdict(found.peak, room) == "exceeds":
        raise refusal(recipe, batches, found.peak, room, console.language)
    console("plan.ahead", peak=memory.shown(found.peak), room=memory.shown(room))


def refusal(recipe: Recipe, batches: Batches, peak: int, room: int, language: str) -> DoesNotFit:
    """The error that says what is missing, and what would fit."""
    from peft_run.messages import sentence
    from peft_run.plan.recipe import remedies

    fitting = [text for text, _ in itertools.islice(remedies(recipe, batches, room), SHOWN)]
    hint = sentence("plan.remedies", language, changes="; ".join(fitting)) if fitting else None
    hint = hint or sentence("plan.no_remedy", language)
    error = DoesNotFit("plan.refused", peak=memory.shown(peak), room=memory.shown(max(0, room)), hint=hint)
    error.remedies = fitting  # type: ignore[attr-defined]
    return error
