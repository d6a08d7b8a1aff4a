"""report.html: all there is to know of a run on one page, in one file, readable without a network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_run.files import write_text
from peft_run.messages import sentence
from peft_run.plots import plot
from peft_run.run import CONFIG, METRICS

if TYPE_CHECKING:
    from peft_run.run import Run

FILE = "report.html"
STYLE = """
body { font: 15px/1.5 system-ui, 'Noto Sans CJK SC', 'PingFang SC', 'Microsoft YaHei', sans-serif; color: #1f2937;
  max-width: 1000px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; border-bottom: 1px solid #e5e7eb; }
table { border-collapse: collapse; } td, th { padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top; }
td:last-child { font-variant-numeric: tabular-nums; } pre { background: #f8fafc; padding: 1rem; overflow-x: auto; }
figure { margin: 1rem 0; } .warning { color: #b45309; } svg { max-width: 100%; height: auto; }
"""


def write_report(run: Run, language: str) -> Path:
    """Draw the plots and write the page. Stages that add to metrics.json appear on it by themselves."""

    def text(key: str) -> str:
        return escape(sentence(f"report.{key}", language))

    plots = [] if not run.events() else plot(run, language)
    metrics = run.read_json(METRICS, {})
    parts = [f"<h1>{escape(run.path.parent.name)} / {escape(run.path.name)}</h1>"]
    parts += [f'<p class="warning">! {escape(w)}</p>' for w in metrics.get("train", {}).get("warnings", [])]
    for stage, values in metrics.items():
        rows = [(name, value) for name, value in values.items() if not isinstance(value, list | dict)]
        parts.append(f"<h2>{text('result')}: {escape(stage)}</h2>{table(rows)}")
    if plots:
        parts.append(f"<h2>{text('curves')}</h2>")
        parts += [f"<figure>{path.read_text(encoding='utf-8')}</figure>" for path in plots]
    environment = run.read_json("env.json", {})
    parts.append(f"<h2>{text('data')}</h2>{data_table(environment.get('data', {}), text)}")
    parts.append(f"<h2>{text('recipe')}</h2><pre>{escape((run / CONFIG).read_text(encoding='utf-8'))}</pre>")
    rows = [(name, value) for name, value in environment.items() if name not in ("data", "packages")]
    rows += list(environment.get("packages", {}).items())
    parts.append(f"<h2>{text('environment')}</h2>{table(rows)}")
    page = "\n".join(
        [
            f'<!doctype html><html lang="{language}"><head><meta charset="utf-8">',
            f"<title>{escape(run.path.parent.name)}</title><style>{STYLE}</style></head><body>",
            *parts,
            "</body></html>",
        ]
    )
    write_text(run / FILE, page + "\n")
    return run / FILE


def table(rows: Sequence[tuple[str, Any]]) -> str:
    cells = (f"<tr><td>{escape(str(name))}</td><td>{escape(shown(value))}</td></tr>" for name, value in rows)
    return f"<table>{''.join(cells)}</table>"


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def data_table(parts: dict[str, list[dict[str, Any]]], text) -> str:
    head = "".join(f"<th>{text(name)}</th>" for name in ("part", "file", "format", "rows", "sha256"))
    rows = [
        f"<tr><td>{escape(part)}</td><td>{escape(file['path'])}</td><td>{escape(file['format'])}</td>"
        f"<td>{file['rows']}</td><td><code>{file['sha256'][:16]}</code></td></tr>"
        for part, files in parts.items()
        for file in files
    ]
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"
