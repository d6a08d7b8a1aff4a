"""plots/: loss, held-out measures, learning rate, speed and memory of a run, drawn from trainer_log.jsonl."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_run.files import write_text
from peft_run.messages import sentence
from peft_run.svg import Line, chart

if TYPE_CHECKING:
    from peft_run.run import Run

FOLDER = "plots"
SMOOTH = 0.9

Chart = tuple[str, list[Line]]  # title, lines


def plot(run: Run, language: str) -> list[Path]:
    """Write every chart as SVG, and as PNG where matplotlib is there. The SVG files."""
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    found = charts(run.events(), language)
    axis = sentence("report.step", language)
    for name, (title, lines) in found.items():
        write_text(folder / f"{name}.svg", chart(title, lines, axis))
    if importlib.util.find_spec("matplotlib") is not None:
        # Labels in English unless matplotlib finds a font that has Chinese: else they would be empty boxes.
        spoken = language if language == "en" or chinese_font() else "en"
        for name, (title, lines) in charts(run.events(), spoken).items():
            draw_png(folder / f"{name}.png", title, lines, sentence("report.step", spoken))
    return [folder / f"{name}.svg" for name in found]


def charts(events: Sequence[dict[str, Any]], language: str) -> dict[str, Chart]:
    """name -> chart, of what was logged."""
    steps = [event for event in events if "loss" in event]
    evaluations = [event for event in events if "eval_loss" in event]

    def text(key: str) -> str:
        return sentence(f"report.{key}", language)

    def of(name: str, rows: Sequence[dict[str, Any]] = steps) -> list[tuple[float, float]]:
        return [(row["step"], row[name]) for row in rows if name in row]

    loss = [
        Line(text("raw"), of("loss"), faint=True),
        Line(text("smooth"), smooth(of("loss"))),
        Line(text("held_out"), of("eval_loss", evaluations), dots=True),
    ]
    found: dict[str, Chart] = {"loss": (text("loss"), loss)}
    measures = sorted({name for row in evaluations for name in row if name.startswith("eval_")} - {"eval_loss"})
    if measures:
        lines = [Line(name[5:], of(name, evaluations), dots=True) for name in measures]
        found["eval"] = (text("measures"), lines)
    found["lr"] = (text("lr"), [Line(text("lr"), of("lr"))])
    found["speed"] = (text("speed"), [Line(text("speed"), of("tokens_per_second"))])
    found["memory"] = (text("memory"), [Line(text("memory"), of("memory_mb"))])
    return {name: (title, lines) for name, (title, lines) in found.items() if any(line.points for line in lines)}


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A running mean that does not lean on its first value."""
    result, mean, weight = [], 0.0, 0.0
    for x, y in points:
        mean, weight = SMOOTH * mean + (1 - SMOOTH) * y, SMOOTH * weight + 1 - SMOOTH
        result.append((x, mean / weight))
    return result


def chinese_font() -> str | None:
    from matplotlib import font_manager

    wanted = ("Noto Sans CJK", "Source Han Sans", "WenQuanYi", "PingFang", "Microsoft YaHei", "SimHei", "Heiti")
    names = {font.name for font in font_manager.fontManager.ttflist}
    return next((name for name in sorted(names) if name.startswith(wanted)), None)


def draw_png(path: Path, title: str, lines: Sequence[Line], axis: str) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    font = chinese_font()
    with rc_context({"font.sans-serif": [font, "DejaVu Sans"], "font.family": "sans-serif"} if font else {}):
        figure = Figure(figsize=(8, 4), dpi=120, layout="constrained")
        axes = figure.subplots()
        for line in lines:
            xs, ys = [x for x, _ in line.points], [y for _, y in line.points]
            axes.plot(xs, ys, label=line.name, alpha=0.3 if line.faint else 1, marker="o" if line.dots else None)
        axes.set_title(title)
        axes.set_xlabel(axis)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path)
