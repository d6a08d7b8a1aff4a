"""The charts of a sweep."""

from __future__ import annotations

import itertools
import math
from typing import Any

from peft_run.messages import sentence
from peft_run.svg import Line, chart
from peft_run.svg_heat import heat
from peft_run.sweep import results
from peft_run.sweep.results import COSTS, FRACTION


def heat_map(found: dict[str, Any], language: str) -> str | None:
    """Over the two axes that move the mean most; None where there are not two that move."""
    axes = [axis for axis, rows in found["effects"].items() if len(rows) > 1]
    if len(axes) < 2:
        return None
    row, column = sorted(axes, key=lambda axis: -results.strength(found["effects"][axis]))[:2]
    rows, columns, cells = results.heat(found["ranking"], row, column)
    return heat(
        sentence("sweep.heat_title", language, objective=found["objective"]),
        rows,
        columns,
        cells,
        row_name=row,
        column_name=column,
        lower_is_better=found["direction"] == "min",
    )


def costs(found: dict[str, Any]) -> list[str]:
    """What was measured of memory and size."""
    return [cost for cost in COSTS if any(t.get(cost) for t in found["ranking"])]


def front(found: dict[str, Any], cost: str, language: str) -> str:
    """Quality over a cost; the front is that of quality, memory and size together."""
    points = {t["trial"]: (t[cost], t["objective"]) for t in found["ranking"] if t.get(cost)}
    best = sorted(points[number] for number in found["pareto"] if number in points)
    lines = [
        Line(sentence("sweep.all_trials", language), list(points.values()), faint=True, dots=True, joined=False),
        Line(sentence("sweep.on_front", language), best, dots=True, joined=False),
    ]
    return chart(found["objective"], lines, sentence(f"sweep.axis_{cost}", language))


def learning_curve(found: dict[str, Any], language: str) -> str:
    """The objective over the share of the training data, each doubling as wide as the next."""
    trials = [(t["values"][FRACTION], t["objective"]) for t in found["ranking"]]
    shares = sorted({share for share, _ in trials})
    every = [(math.log2(share), value) for share, value in trials]
    middle, top = [], []
    for share in shares:
        values = [value for other, value in trials if other == share]
        middle.append((math.log2(share), sum(values) / len(values)))
        top.append((math.log2(share), min(values) if found["direction"] == "min" else max(values)))
    lines = [
        Line(sentence("sweep.each", language), every, faint=True, dots=True, joined=False),
        Line(sentence("sweep.mean", language), middle, dots=True),
        Line(sentence("sweep.best_line", language), top, dots=True),
    ]
    ticks = [(math.log2(share), f"{share:g}") for share in shares]
    return chart(found["objective"], lines, FRACTION, spaced(ticks))


def effect(found: dict[str, Any], axis: str, language: str) -> str:
    """Every trial at its level of the axis, and the means."""
    rows = found["effects"][axis]
    every = [(float(place), value) for place, row in enumerate(rows) for value in row["values"]]
    lines = [
        Line(sentence("sweep.each", language), every, faint=True, dots=True, joined=False),
        Line(sentence("sweep.mean", language), [(float(i), row["mean"]) for i, row in enumerate(rows)], dots=True),
    ]
    return chart(f"{axis}: {found['objective']}", lines, axis, [(float(i), row["level"]) for i, row in enumerate(rows)])


def spaced(ticks: list[tuple[float, str]], most: int = 10) -> list[tuple[float, str]]:
    """At most so many marks, evenly taken."""
    return list(itertools.islice(ticks, 0, None, max(1, -(-len(ticks) // most))))
