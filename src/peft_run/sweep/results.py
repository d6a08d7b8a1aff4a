"""From the trials of a sweep to figures: ranking, effects of the axes, what is worth its memory and size."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from peft_run.metrics import resample
from peft_run.metrics.table import mean
from peft_run.sweep.folder import DONE, FAILED, PRUNED, Folder
from peft_run.sweep.settings import Settings
from peft_run.sweep.space import key_of, short

Trial = dict[str, Any]  # a line of trials.jsonl

MOST_LEVELS = 8  # an axis with more values is cut into BINS parts of equal counts
BINS = 5
FRACTION, SEED = "data.fraction", "train.seed"
COSTS = ("peak_memory_mb", "file_mb")


class Levels(NamedTuple):
    """The values of an axis as few places, in order."""

    names: list[str]
    of: dict[str, int]  # a value, as JSON -> its place

    def __getitem__(self, value: Any) -> int:  # type: ignore[override]
        return self.of[json.dumps(value, sort_keys=True)]


def result(folder: Folder) -> dict[str, Any]:
    """Everything that the report shows, as JSON."""
    settings, trials = folder.settings, list(folder.trials().values())
    ranked = ranking(trials, settings)
    add_chance(ranked, folder, settings)
    return {
        "objective": settings.objective,
        "direction": "min" if settings.lower_is_better else "max",
        "search": settings.search,
        "seed": settings.seed,
        "counts": {state: sum(t["state"] == state for t in trials) for state in (DONE, PRUNED, FAILED)},
        "best": ranked[0]["trial"] if ranked else None,
        "ranking": ranked,
        "pareto": pareto(ranked, settings),
        "effects": {axis: effect(ranked, axis) for axis in settings.axes},
        "seed_spread": seed_spread(ranked),
        "not_finished": [t for t in trials if t["state"] != DONE],
    }


def ranking(trials: Sequence[Trial], settings: Settings) -> list[Trial]:
    """Finished trials, best first; of equals, the earlier one."""
    sign = 1 if settings.lower_is_better else -1
    return sorted((t for t in trials if t["state"] == DONE), key=lambda t: (sign * t["objective"], t["trial"]))


def add_chance(ranked: Sequence[Trial], folder: Folder, settings: Settings) -> None:
    """`p`: how often chance alone makes a trial differ so much from the best one, on the samples that both answered."""
    from peft_run.compare.collect import Entry, against
    from peft_run.run import Run

    if not settings.evaluate:
        return
    runs = [Run(folder / trial["run"]) for trial in ranked]
    if not all((run / "evaluation.npz").is_file() for run in runs):  # runs may have been removed to save space
        return
    entries = [Entry(run) for run in runs]
    for trial, entry in zip(ranked[1:], entries[1:]):
        trial["p"] = against(settings.objective, entries[0], entry).get("p")


def levels(trials: Sequence[Trial], axis: str) -> Levels:
    values = {json.dumps(t["values"][axis], sort_keys=True): t["values"][axis] for t in trials}
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values.values())
    order = sorted(values, key=lambda key: values[key]) if numeric else list(values)
    if not numeric or len(order) <= MOST_LEVELS:
        return Levels([short(values[key]) for key in order], {key: i for i, key in enumerate(order)})
    parts = [list(part) for part in np.array_split(np.array(order, dtype=object), BINS)]
    names = [f"{short(values[part[0]])}–{short(values[part[-1]])}" for part in parts]
    return Levels(names, {key: i for i, part in enumerate(parts) for key in part})


def effect(trials: Sequence[Trial], axis: str) -> list[dict[str, Any]]:
    """What the trials at each level of an axis came to, over all that the other axes did."""
    if not trials:
        return []
    places = levels(trials, axis)
    rows = []
    for place, name in enumerate(places.names):
        values = [t["objective"] for t in trials if places[t["values"][axis]] == place]
        rows.append({"level": name, "trials": len(values), **average(values), "values": values})
    return rows


def average(values: Sequence[float]) -> dict[str, Any]:
    """The mean, and its 95 % interval over trials."""
    stats = np.array([[value, 1.0] for value in values])
    return {"mean": statistics.fmean(values), "interval": resample.interval(stats, mean)}


def strength(rows: Sequence[dict[str, Any]]) -> float:
    """How far an axis moves the mean."""
    means = [row["mean"] for row in rows]
    return max(means) - min(means) if len(means) > 1 else -math.inf


def heat(trials: Sequence[Trial], row: str, column: str) -> tuple[list[str], list[str], list[list[float | None]]]:
    """Names of rows and columns, and the mean of the trials in each cell."""
    down, across = levels(trials, row), levels(trials, column)
    found: list[list[list[float]]] = [[[] for _ in across.names] for _ in down.names]
    for t in trials:
        found[down[t["values"][row]]][across[t["values"][column]]].append(t["objective"])
    return down.names, across.names, [[statistics.fmean(cell) if cell else None for cell in line] for line in found]


def pareto(trials: Sequence[Trial], settings: Settings) -> list[int]:
    """Trials that no other equals or beats in quality, memory and size at once, and beats in one."""
    sign = 1 if settings.lower_is_better else -1
    points = {t["trial"]: (sign * t["objective"], *(t.get(cost) or 0.0 for cost in COSTS)) for t in trials}

    def beaten(point: tuple[float, ...]) -> bool:
        return any(other != point and all(a <= b for a, b in zip(other, point)) for other in points.values())

    return [number for number, point in points.items() if not beaten(point)]


def seed_spread(trials: Sequence[Trial]) -> float | None:
    """The standard deviation among trials that differ in their seed alone: what no setting is the cause of."""
    groups: dict[str, list[float]] = {}
    for t in trials:
        others = {name: value for name, value in t["values"].items() if name != SEED}
        groups.setdefault(key_of(others), []).append(t["objective"])
    repeated = [values for values in groups.values() if len(values) > 1]
    if not repeated:
        return None
    free = sum(len(values) - 1 for values in repeated)
    return math.sqrt(sum(statistics.variance(values) * (len(values) - 1) for values in repeated) / free)
