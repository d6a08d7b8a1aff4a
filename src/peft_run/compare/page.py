"""A comparison to read: on the terminal, and as one HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_run.compare.collect import FACTS
from peft_run.document import Document
from peft_run.evaluate import report
from peft_run.files import check_parent, write_text
from peft_run.messages import sentence
from peft_run.plots import smooth
from peft_run.run import Run
from peft_run.svg import Line, chart

CURVES = ("loss", "eval_loss", "lr")  # of trainer_log.jsonl


def table(result: dict[str, Any], language: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a measure a row, a run a column; after the second run's value, its verdict against the first."""
    runs = [run["name"] for run in result["runs"]]
    rows = []
    for metric, values in result["measures"].items():
        base = next((v for v in values.values() if v.get("base") is not None), {})
        row = [metric, report.with_interval(base, "base")]
        for run in runs:
            value = values.get(run, {})
            row.append(report.with_interval(value, "tuned"))
            if run != runs[0]:
                row.append(versus_text(value, language))
        rows.append(row)
    header = [sentence("evaluate.measure", language), sentence("evaluate.base", language), runs[0]]
    for run in runs[1:]:
        header += [run, sentence("compare.against", language, run=runs[0])]
    return header, rows


def versus_text(value: dict[str, Any], language: str) -> str:
    if "verdict" not in value:
        return ""
    verdict = report.verdict(value["verdict"], language)
    p = "-" if value["p"] is None else f"{value['p']:.4f}"
    return type(verdict)(f"{verdict} ({report.with_interval(value, 'difference')}, p {p})")


def facts_table(result: dict[str, Any], language: str) -> tuple[list[str], list[list[str]]]:
    header = ["", *(run["name"] for run in result["runs"])]
    rows = []
    for fact in (*FACTS, "file_mb"):
        values = [run[fact] for run in result["runs"]]
        if any(value is not None for value in values):
            rows.append([sentence(f"compare.{fact}", language), *map(shown, values)])
    return header, rows


def shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return report.show(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def page(result: dict[str, Any], runs: Sequence[Run], language: str) -> Document:
    def say(key: str, /, **values: Any) -> str:
        return sentence(key, language, **values)

    names = [run["name"] for run in result["runs"]]
    document = Document(say("compare.title", names=", ".join(names)), language)
    for run in result["not_evaluated"]:
        document.text(say("compare.not_evaluated", run=run))
    if result["measures"]:
        document.heading(say("evaluate.measures"))
        document.table(*table(result, language))
        document.text(say("evaluate.how_sure"))
    document.heading(say("compare.training"))
    document.table(*facts_table(result, language))
    events = [run.events() for run in runs]
    for field in CURVES:
        lines = [Line(name, points(of_run, field)) for name, of_run in zip(names, events, strict=True)]
        if any(line.points for line in lines):
            caption = say(f"compare.curve_{field}")
            document.figure(chart(caption, lines, say("compare.step")), caption)
    document.heading(say("compare.recipes"))
    if result["recipes"]:
        rows = [[field, *map(shown, values)] for field, values in result["recipes"].items()]
        document.table([say("compare.field"), *names], rows)
    else:
        document.text(say("compare.same_recipe"))
    for group, rows in result["samples"].items():
        document.heading(say("compare.spread" if group == "changed" else f"evaluate.{group}"))
        document.table(*samples_table(rows, names, language))
    return document


def points(events: Sequence[dict[str, Any]], field: str) -> list[tuple[float, float]]:
    found = [(event["step"], event[field]) for event in events if event.get(field) is not None]
    return smooth(found) if field == "loss" else found


def samples_table(
    rows: Sequence[dict[str, Any]], names: Sequence[str], language: str
) -> tuple[list[str], list[list[str]]]:
    judged = [name for name in names if rows and name in rows[0]["tuned"]]
    with_base = any(row["base"] for row in rows)
    header = [
        sentence(f"evaluate.{key}", language) for key in ("prompt", "reference", *(["base"] if with_base else []))
    ]
    table = []
    for row in rows:
        answers = ([row["base"]] if with_base else []) + [row["tuned"][name] for name in judged]
        cells = [f"{report.flat(answer['answer'])}\n{report.brief(answer)}" if answer else "" for answer in answers]
        table.append([row["prompt"], report.flat(row["reference"]), *cells])
    return [*header, *judged], table


def write(result: dict[str, Any], runs: Sequence[Run], path: Path, language: str) -> None:
    check_parent(path)
    write_text(path, page(result, runs, language).html())
