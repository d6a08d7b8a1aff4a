"""report.html and report.md: a sweep to read, in one page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from peft_run.document import Bad, Document, Good
from peft_run.files import write_text
from peft_run.messages import sentence
from peft_run.plots import FOLDER as PLOTS
from peft_run.sweep import charts
from peft_run.sweep.folder import FAILED, RECIPE, SETTINGS, Folder
from peft_run.sweep.results import FRACTION, result
from peft_run.sweep.space import label_of, short

PAGE, MARKDOWN = "report.html", "report.md"
SURE = 0.05  # p below which a trial counts as worse than the best one


def write(folder: Folder, language: str) -> dict[str, Any]:
    """Draw the charts and write both pages; what they show, as JSON."""
    found = result(folder)
    document = make(folder, found, language)
    (folder / PLOTS).mkdir(exist_ok=True)
    for kind, block in document.blocks:
        if kind == "figure":
            write_text(folder / block[2], block[0])
    write_text(folder / PAGE, document.html())
    write_text(folder / MARKDOWN, document.markdown())
    return found


def make(folder: Folder, found: dict[str, Any], language: str) -> Document:
    def say(key: str, /, **values: Any) -> str:
        return sentence(f"sweep.{key}", language, **values)

    document = Document(say("title", name=folder.settings.name), language)
    objective = say(f"objective_{found['direction']}", name=found["objective"])
    document.text(say("summary", **found["counts"], search=found["search"], seed=found["seed"], objective=objective))
    if found["ranking"]:
        best = found["ranking"][0]
        document.text(say("best", number=best["trial"], point=label_of(best["values"]), value=shown(best)))
        document.text(say("flattered"))
        if (spread := found["seed_spread"]) is not None:
            document.text(say("seed_spread", value=f"{spread:.3g}"))
        document.heading(say("ranking"))
        document.table(*ranking_table(found, language))
        document.text(say("how_ranked"))
        for name, svg, caption in figures(found, language):
            if caption is not None:
                document.heading(caption)
            document.figure(svg, say(f"figure_{name.partition('-')[0]}"), f"{PLOTS}/{name}.svg")
        document.heading(say("effects"))
        document.text(say("how_effects"))
        document.table(*effects_table(found, language))
    if found["not_finished"]:
        document.heading(say("not_finished"))
        rows = [
            [str(t["trial"]), label_of(t["values"]), say(f"state_{t['state']}"), t.get("reason", "")]
            for t in found["not_finished"]
        ]
        marked = [
            [*row[:2], Bad(row[2]) if t["state"] == FAILED else row[2], row[3]]
            for row, t in zip(rows, found["not_finished"])
        ]
        document.table([say("number"), say("values"), say("state"), say("reason")], marked)
    for file in (SETTINGS, RECIPE):
        document.heading(say("file", name=file))
        document.code((folder / file).read_text(encoding="utf-8").rstrip())
    return document


def figures(found: dict[str, Any], language: str) -> Iterator[tuple[str, str, str | None]]:
    """(name of the file, SVG, heading before it)"""
    if (svg := charts.heat_map(found, language)) is not None:
        yield "heat", svg, sentence("sweep.heat", language)
    heading: str | None = sentence("sweep.pareto", language)
    for cost in charts.costs(found):
        yield f"pareto-{cost}", charts.front(found, cost, language), heading
        heading = None
    if len(found["effects"].get(FRACTION, [])) > 1:
        yield "curve", charts.learning_curve(found, language), sentence("sweep.curve", language)
    heading = sentence("sweep.effect_charts", language)
    for axis, rows in found["effects"].items():
        if len(rows) > 1:
            yield f"effect-{re.sub(r'[^a-z0-9_]+', '-', axis.lower())}", charts.effect(found, axis, language), heading
            heading = None


def ranking_table(found: dict[str, Any], language: str) -> tuple[list[str], list[list[str]]]:
    def say(key: str) -> str:
        return sentence(f"sweep.{key}", language)

    axes = list(found["effects"])
    others = (
        [name for name in found["ranking"][0]["measures"] if name != found["objective"]] if found["ranking"] else []
    )
    header = ["", say("number"), *axes, found["objective"], say("p"), *others]
    header += [say(name) for name in ("memory", "size", "seconds", "front")]
    rows = []
    for place, t in enumerate(found["ranking"], 1):
        p = t.get("p")
        rows.append(
            [
                str(place),
                str(t["trial"]),
                *(short(t["values"][axis]) for axis in axes),
                shown(t),
                "" if p is None else Bad(f"{p:.3f}") if p < SURE else f"{p:.3f}",
                *(number(t["measures"].get(name)) for name in others),
                number(t.get("peak_memory_mb")),
                number(t.get("file_mb")),
                number(t.get("seconds")),
                Good("✓") if t["trial"] in found["pareto"] else "",
            ]
        )
    return header, rows


def effects_table(found: dict[str, Any], language: str) -> tuple[list[str], list[list[str]]]:
    header = [sentence(f"sweep.{key}", language) for key in ("axis", "value", "trials", "mean", "interval")]
    rows = [
        [axis, row["level"], str(row["trials"]), number(row["mean"]), ends(row["interval"])]
        for axis, levels in found["effects"].items()
        for row in levels
    ]
    return header, rows


def shown(trial: dict[str, Any]) -> str:
    """The objective with its interval."""
    interval = ends(trial.get("interval"))
    return f"{trial['objective']:.4f}" + (f" [{interval}]" if interval else "")


def ends(interval: Any) -> str:
    return "" if not interval or None in interval else f"{interval[0]:.4f}, {interval[1]:.4f}"


def number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else json.dumps(value)
