"""report.html: all there is to know of a run on one page, in one file, readable without a network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_run.document import Bad, Document
from peft_run.files import write_text
from peft_run.messages import sentence
from peft_run.plots import plot
from peft_run.run import CONFIG, METRICS

if TYPE_CHECKING:
    from peft_run.run import Run

FILE = "report.html"


def write_report(run: Run, language: str) -> Path:
    """Draw the plots and write the page. Stages that add to metrics.json appear on it by themselves."""

    def text(key: str) -> str:
        return sentence(f"report.{key}", language)

    plots = plot(run, language) if run.events() else []
    metrics, environment = run.read_json(METRICS, {}), run.read_json("env.json", {})
    page = Document(f"{run.path.parent.name} / {run.path.name}", language)
    for warning in metrics.get("train", {}).get("warnings", []):
        page.text(Bad(f"! {warning}"))
    for stage, values in metrics.items():
        page.heading(f"{text('result')}: {stage}")
        page.table(*facts({name: value for name, value in values.items() if not isinstance(value, list | dict)}))
    if plots:
        page.heading(text("curves"))
    for path in plots:
        page.figure(path.read_text(encoding="utf-8"), "")
    page.heading(text("data"))
    page.table(
        [text(name) for name in ("part", "file", "format", "rows", "sha256")],
        [
            [part, file["path"], file["format"], str(file["rows"]), file["sha256"][:16]]
            for part, files in environment.get("data", {}).items()
            for file in files
        ],
    )
    page.heading(text("recipe"))
    page.code((run / CONFIG).read_text(encoding="utf-8"))
    page.heading(text("environment"))
    machine = {name: value for name, value in environment.items() if name not in ("data", "packages")}
    page.table(*facts(machine | environment.get("packages", {})))
    write_text(run / FILE, page.html())
    return run / FILE


def facts(values: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: name, value."""
    return ["", ""], [[str(name), shown(value)] for name, value in values.items()]


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
