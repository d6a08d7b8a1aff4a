"""Heat maps as SVG text: a table of numbers whose cells are the darker, the better they are."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from peft_run.svg import LEFT, RIGHT, TOP, WIDTH, canvas

CELL = 44  # height
SIDE = 110  # width of the labels of the rows
LIGHT, DARK = (239, 246, 255), (29, 78, 216)


def heat(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Sequence[Sequence[float | None]],
    *,
    row_name: str,
    column_name: str,
    lower_is_better: bool,
) -> str:
    """cells: a list for each row; None where nothing is known."""
    bottom = TOP + CELL * len(rows)
    parts = canvas(title, bottom + 50)
    known = [value for row in cells for value in row if value is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    wide = (WIDTH - SIDE - RIGHT) / len(columns)
    for i, (name, row) in enumerate(zip(rows, cells)):
        y = TOP + CELL * i
        parts.append(label(SIDE - 8, y + CELL / 2 + 4, name, "end"))
        for j, value in enumerate(row):
            x = SIDE + wide * j
            share = 0.0 if value is None else (value - low) / (high - low or 1)
            good = 1 - share if lower_is_better else share
            fill = "#f3f4f6" if value is None else mixed(good)
            parts.append(f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{CELL}" fill="{fill}" stroke="#fff"/>')
            ink = "#fff" if value is not None and good > 0.55 else "#111"
            text = "–" if value is None else f"{value:.4g}"
            parts.append(label(x + wide / 2, y + CELL / 2 + 4, text, "middle", ink))
    for j, name in enumerate(columns):
        parts.append(label(SIDE + wide * (j + 0.5), bottom + 18, name, "middle"))
    parts.append(label(WIDTH - RIGHT, bottom + 38, column_name, "end"))
    parts.append(label(LEFT - 60, bottom + 38, f"↑ {row_name}", "start"))
    return "\n".join([*parts, "</svg>"])


def label(x: float, y: float, text: str, anchor: str, fill: str = "#555") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}">{escape(text)}</text>'


def mixed(share: float) -> str:
    """Between light (0) and dark (1)."""
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(LIGHT, DARK))
