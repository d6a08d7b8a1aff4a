"""What an evaluation leaves in the run: evaluation.jsonl, every sample; .npz, its numbers; .md and .html, to read."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from peft_run.document import Bad, Document, Good
from peft_run.files import write_bytes, write_text
from peft_run.messages import sentence

if TYPE_CHECKING:
    from peft_run.console import Console
    from peft_run.evaluate.results import Results
    from peft_run.run import Run

SAMPLES, NUMBERS, MARKDOWN, PAGE = (f"evaluation.{end}" for end in ("jsonl", "npz", "md", "html"))
MOST_LABELS = 25  # a larger table of confusions is not read


def write(run: Run, result: dict[str, Any], found: Results, console: Console) -> None:
    rows = found.rows()
    result["picks"] = found.picks()
    write_text(run / SAMPLES, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_bytes(run / NUMBERS, packed(found))
    document = make(run, result, rows, console.language)
    write_text(run / MARKDOWN, document.markdown())
    write_text(run / PAGE, document.html())


def packed(found: Results) -> bytes:
    """side/stats -> (samples, k), with NaN rows for samples without: `peft compare` computes with these."""
    arrays = {}
    for side in found.sides:
        for stats in sorted({metric.stats for metric in found.measures}):
            known = [one.stats.get(stats) for one in found.seen[side]]
            size = next((len(row) for row in known if row is not None), 0)
            arrays[f"{side}/{stats}"] = np.array([row or [np.nan] * size for row in known])
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def make(run: Run, result: dict[str, Any], rows: Sequence[dict[str, Any]], language: str) -> Document:
    def say(key: str, /, **values: Any) -> str:
        return sentence(f"evaluate.{key}", language, **values)

    document = Document(say("title", name=f"{run.path.parent.name}/{run.path.name}"), language)
    source = say(f"from_{result['source']}")
    document.text(say("judged", count=result["samples"], source=source))
    if result["base"]:
        document.text(say(f"base_{result['base']}"))
    for note in result["notes"]:
        document.text(sentence(note["note"], language, **note))
    document.heading(say("measures"))
    document.table(*metrics_table(result, language))
    document.text(say("how_sure"))
    if result["forgetting"]:
        document.heading(say("forgetting_title"))
        document.table(*forgetting_table(result, language))
        document.text(say("forgetting_means"))
    if "labels" in result:
        add_labels(document, result, language)
    for name, numbers in result["picks"].items():
        document.heading(say(name))
        document.table(*samples_table([rows[i] for i in numbers], language))
    return document


def metrics_table(result: dict[str, Any], language: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows: measure, base, tuned, difference, p, verdict."""
    names = ("measure", "base", "tuned", "difference", "p", "verdict")
    header = [sentence(f"evaluate.{name}", language) for name in names]
    rows = []
    for name, metric in result["metrics"].items():
        row = [name, *(with_interval(metric, side) for side in ("base", "tuned", "difference"))]
        p = metric.get("p")
        row.append("" if p is None else f"{p:.4f}")
        row.append(verdict(metric.get("verdict"), language))
        rows.append(row)
    return header, rows


def with_interval(metric: dict[str, Any], side: str) -> str:
    if side not in metric:
        return ""
    interval = metric.get(f"{side}_interval")
    ends = f" [{show(interval[0])}, {show(interval[1])}]" if interval else ""
    return show(metric[side]) + ends


def show(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.1f}"


def verdict(name: str | None, language: str) -> str:
    if name is None:
        return ""
    text = sentence(f"evaluate.{name}", language)
    return {"better": Good, "worse": Bad}.get(name, str)(text)


def forgetting_table(result: dict[str, Any], language: str) -> tuple[list[str], list[list[str]]]:
    names = ("text", "base", "tuned", "ratio")
    rows = []
    for name, text in result["forgetting"].items():
        row = [name, *(show(text.get(side)) for side in ("base", "tuned"))]
        rows.append([*row, with_interval(text, "ratio")])
    return [sentence(f"evaluate.{name}", language) for name in names], rows


def add_labels(document: Document, result: dict[str, Any], language: str) -> None:
    labels, commonest = result["labels"], result["commonest"]
    document.heading(sentence("evaluate.labels", language))
    document.text(sentence("evaluate.commonest", language, label=commonest["label"], share=commonest["accuracy"]))
    sides = [side for side in ("base", "tuned") if side in result["f1_of_labels"]]
    header = [sentence(f"evaluate.{name}", language) for name in ("label", "support", *(f"f1_{s}" for s in sides))]
    rows = [
        [label, str(result["support"][i]), *(show(result["f1_of_labels"][side][i]) for side in sides)]
        for i, label in enumerate(labels)
    ]
    document.table(header, rows)
    if len(labels) > MOST_LABELS:
        return
    for side in sides:
        corner = sentence("evaluate.confusion", language, side=sentence(f"evaluate.{side}", language))
        other = sentence("evaluate.other", language)
        table = [[label, *map(str, row)] for label, row in zip(labels, result["confusion"][side], strict=True)]
        document.table([corner, *labels, other], table)


def samples_table(rows: Sequence[dict[str, Any]], language: str) -> tuple[list[str], list[list[str]]]:
    sides = [side for side in ("base", "tuned") if rows and side in rows[0]]
    names = ("prompt", "reference", *sides)
    table = [
        [row["prompt"], flat(row["reference"]), *(f"{flat(row[side]['answer'])}\n{brief(row[side])}" for side in sides)]
        for row in rows
    ]
    return [sentence(f"evaluate.{name}", language) for name in names], table


def flat(value: Any) -> str:
    if value is None:
        return ""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def brief(side: dict[str, Any]) -> str:
    """The measures of one answer in a line."""
    return "(" + ", ".join(f"{name} {show(value)}" for name, value in side["measures"].items()) + ")"
