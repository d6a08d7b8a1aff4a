"""The settings of a sweep: a file of its own, beside the recipe that it varies."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import Discriminator, Field, Tag, model_validator

from peft_run.config.load import Loader, canonical, first_problem, read
from peft_run.config.schema import Positive, Section
from peft_run.errors import UsageError

LOSS = "loss"  # the held-out loss, which every task has
MOST = 10_000  # values of one range


class Range(Section):
    """From low to high, both included. `step` is added from value to value; with `log`, multiplied."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @model_validator(mode="after")
    def is_a_range(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"low must be below high, got {self.low:g} and {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"with log, low must be above 0, got {self.low:g}")
        if self.step is not None and self.step <= (1 if self.log else 0):
            raise ValueError(f"step must be above {1 if self.log else 0}, got {self.step:g}")
        if self.step is not None and self.size() > MOST:
            raise ValueError(f"step {self.step:g} makes more than {MOST} values")
        return self

    def size(self) -> int:
        """How many values its steps make."""
        assert self.step is not None
        span = math.log(self.high / self.low, self.step) if self.log else (self.high - self.low) / self.step
        return int(span + 1e-9) + 1

    def values(self) -> list[float]:
        """Those of its steps, without the dust of binary fractions."""
        assert self.step is not None
        found = (self.low * self.step**i if self.log else self.low + i * self.step for i in range(self.size()))
        return [float(f"{value:.12g}") for value in found]


Axis = Annotated[
    Annotated[Range, Tag("range")] | Annotated[list[Any], Field(min_length=1), Tag("values")],
    Discriminator(lambda given: "values" if isinstance(given, list) else "range"),
]


class Settings(Section):
    """What is varied, how it is searched, and what counts as good."""

    version: Literal[1] = 1
    axes: dict[str, Axis] = {}
    search: Literal["grid", "random", "tpe"] = "grid"
    trials: Positive | None = None  # grid: all there are
    objective: str = LOSS
    direction: Literal["min", "max"] | None = None  # that of the objective
    prune: Literal["none", "median"] = "none"
    evaluate: bool = True  # judge every trial; without, only the held-out loss of the training is known
    seed: int = 0
    storage: str | None = None  # of Optuna; default: a file in the sweep's folder
    study: str | None = None  # its name there; default: the recipe's
    name: str | None = None  # of the folder; default: output.name of the recipe

    @model_validator(mode="after")
    def fits_together(self) -> Settings:
        if not self.axes:
            raise ValueError("axes: a sweep needs at least one, such as adapter.r: [4, 8, 16]")
        if self.search != "grid" and self.trials is None:
            raise ValueError(f"trials: search: {self.search} needs a number of trials")
        if self.search != "tpe":
            for name in ("prune", "storage", "study"):
                if getattr(self, name) not in (None, "none"):
                    raise ValueError(f"{name}: only with search: tpe")
        if not self.evaluate and self.objective != LOSS:
            raise ValueError(f"evaluate: false leaves {LOSS} as the only objective")
        if self.name is not None and (self.name in (".", "..", "") or any(c in self.name for c in "/\\:\0")):
            raise ValueError(f"name must be the plain name of a folder, got {self.name!r}")
        return self

    @property
    def lower_is_better(self) -> bool:
        from peft_run.metrics.table import METRICS

        if self.direction is not None:
            return self.direction == "min"
        return not METRICS[self.objective].higher_is_better

    def dump(self) -> str:
        values = self.model_dump(mode="json")
        values["axes"] = {
            name: {key: value for key, value in axis.items() if value not in (None, False)}
            if isinstance(axis, dict)
            else axis
            for name, axis in values["axes"].items()
        }
        return yaml.safe_dump(values, allow_unicode=True, sort_keys=False, width=120)


def load_settings(file: Path | None, axis_options: Sequence[str] = (), **changes: Any) -> Settings:
    """The settings of a file with the command line's changes. Raises UsageError naming what is wrong."""
    raw = read(file) if file is not None else {}
    raw |= {name: value for name, value in changes.items() if value is not None}
    if not isinstance(raw.get("axes", {}), dict):
        raise UsageError("sweep.no_axes", file=file)
    raw["axes"] = dict(raw.get("axes") or {}) | dict(parse_axis(text) for text in axis_options)
    named: dict[str, Any] = {}
    for name, axis in raw["axes"].items():
        own = ".".join(canonical(str(name).split("."), None)[0])
        if own in named:
            raise UsageError("sweep.axis_twice", axis=own)
        named[own] = axis
    try:
        settings = Settings.model_validate({**raw, "axes": named})
    except pydantic.ValidationError as error:
        raise UsageError("sweep.invalid", file=file or "sweep", problem=first_problem(error, nearest)) from error
    check_objective(settings.objective)
    return settings


def nearest(name: str) -> str | None:
    """The key of a sweep's file that somebody may have meant."""
    known = [*Settings.model_fields, *Range.model_fields]
    close = difflib.get_close_matches(name.rpartition(".")[2], known, n=1, cutoff=0.5)
    return close[0] if close else None


def parse_axis(text: str) -> tuple[str, Any]:
    """`adapter.r=4,8,16`, or the range `train.lr={low: 1e-4, high: 1e-2, log: true}`."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip() or not value.strip():
        raise UsageError("sweep.bad_axis", text=text)
    try:
        parsed = yaml.load(value if value.lstrip().startswith(("{", "[")) else f"[{value}]", Loader)
    except yaml.YAMLError as error:
        raise UsageError("sweep.bad_axis", text=text) from error
    return name.strip().replace("-", "_"), parsed


def check_objective(name: str) -> None:
    from peft_run.metrics.table import METRICS

    if name not in METRICS:
        near = difflib.get_close_matches(name, METRICS, n=1, cutoff=0)
        raise UsageError("sweep.no_objective", name=name, nearest=(near or [LOSS])[0])


def read_settings(folder: Path) -> Settings:
    return load_settings(folder / "sweep.yaml")
