"""The points of a sweep: what each axis can be, and grids and random draws over all of them, with no library."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peft_run.config import Recipe
from peft_run.config.load import fields, put, validate
from peft_run.errors import UsageError
from peft_run.sweep.settings import Range, Settings

Point = dict[str, Any]  # dotted name of a field -> value

# What names the run, or decides which samples a trial is judged on: trials that differ there cannot be ranked.
FIXED = ("version", "task", "output", "track", "eval", "data.eval", "data.test", "data.seed")


@dataclass
class Axis:
    """One field of the recipe: either `values`, or all numbers from low to high."""

    name: str
    values: list[Any] | None = None
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    integer: bool = False

    @property
    def size(self) -> float:
        """How many values there are; infinite for real numbers."""
        if self.values is not None:
            return len(self.values)
        return self.high - self.low + 1 if self.integer else math.inf

    def draw(self, rng: random.Random) -> Any:
        if self.values is not None:
            return self.values[rng.randrange(len(self.values))]
        # Half a step beyond both ends, so that the outer integers are as likely as the inner ones.
        edge = 0.5 if self.integer else 0.0
        low, high = self.low - edge, self.high + edge
        value = math.exp(rng.uniform(math.log(low), math.log(high))) if self.log else rng.uniform(low, high)
        if self.integer:
            return int(min(max(round(value), self.low), self.high))
        return float(f"{min(max(value, self.low), self.high):.6g}")


class Space:
    """The axes of a sweep over a recipe. Raises UsageError for a name or value that the recipe would refuse."""

    def __init__(self, settings: Settings, recipe: Recipe) -> None:
        self.recipe = recipe
        self.axes = [self.axis(name, given) for name, given in settings.axes.items()]

    def axis(self, name: str, given: Range | list[Any]) -> Axis:
        if any(name == fixed or name.startswith(f"{fixed}.") for fixed in FIXED):
            raise UsageError("sweep.fixed", axis=name, fixed=", ".join(FIXED))
        if isinstance(given, Range) and given.step is None:
            ends = [self.checked(name, end) for end in (given.low, given.high)]
            if not all(isinstance(end, int | float) and not isinstance(end, bool) for end in ends):
                raise UsageError("sweep.no_number", axis=name)
            return Axis(name, None, *ends, log=given.log, integer=is_integer(name, given))
        values = [self.checked(name, value) for value in (given.values() if isinstance(given, Range) else given)]
        if len({key_of({name: value}) for value in values}) < len(values):
            raise UsageError("sweep.value_twice", axis=name)
        return Axis(name, values)

    def checked(self, name: str, value: Any) -> Any:
        """The value as the recipe has it: `"1e-4"` is a number, 8.0 a rank of 8."""
        return look_up(recipe_at(self.recipe, {name: value}).model_dump(mode="json"), name)

    def lists(self) -> dict[str, list[Any]]:
        """The axes that are lists of values."""
        return {axis.name: axis.values for axis in self.axes if axis.values is not None}

    @property
    def size(self) -> float:
        return math.prod(axis.size for axis in self.axes)

    def grid(self) -> Iterator[Point]:
        """All points; the last axis moves fastest."""
        for axis in self.axes:
            if axis.values is None:
                raise UsageError("sweep.endless", axis=axis.name)
        for values in itertools.product(*(axis.values or [] for axis in self.axes)):
            yield dict(zip((axis.name for axis in self.axes), values))

    def random(self, seed: int) -> Iterator[Point]:
        """Points drawn at random, none twice, until there are no more. A longer draw begins with the shorter one."""
        rng = random.Random(f"sweep-{seed}")
        seen: set[str] = set()
        while len(seen) < self.size:
            point = {axis.name: axis.draw(rng) for axis in self.axes}
            if (key := key_of(point)) not in seen:
                seen.add(key)
                yield point


def recipe_at(recipe: Recipe, point: Point) -> Recipe:
    """The recipe with the values of a point."""
    raw = recipe.model_dump(mode="json")
    for name, value in point.items():
        if name == "model.quant.bits" and value is None:  # not quantized, whatever the recipe says
            name = "model.quant"
        put(raw, name.split("."), value)
    return validate(raw, recipe.base, "sweep")


def key_of(point: Point) -> str:
    """Equal for equal points."""
    return json.dumps(point, sort_keys=True, ensure_ascii=False)


def label_of(point: Point) -> str:
    """`adapter.r=4 train.lr=0.001`"""
    return " ".join(f"{name}={short(value)}" for name, value in point.items())


def short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def look_up(values: Any, name: str) -> Any:
    """A field of a dumped recipe; None inside a section that is None."""
    for part in name.split("."):
        if values is None:
            return None
        values = values[int(part)] if isinstance(values, list) else values[part]
    return values


def is_integer(name: str, given: Range) -> bool:
    """Whether the field takes whole numbers only; an option of a method, whether its ends are whole."""
    field = dict(fields()).get(name)
    whole = float(given.low).is_integer() and float(given.high).is_integer()
    return whole and (field is None or "float" not in str(field.annotation))
