"""What `peft plan --json` says, as a bar of the memory that a training takes."""

from __future__ import annotations

from html import escape
from typing import Any

from peft_run.svg import COLOURS
from peft_run.ui.command import Answer
from peft_run.ui.layout import Page, table, wrong

REFUSED = 4  # the exit code of a recipe that does not fit


def shown(page: Page, answer: Answer) -> str:
    told = wrong(answer.told) if answer.code else ""
    if not isinstance(answer.result, dict):
        return told
    parts = parts_of(answer.result)
    rows = [[name, str(value)] for name, value in answer.result.items() if isinstance(value, str | int | float)]
    return told + (bar(parts, room_of(answer.result)) if parts else "") + table(["", ""], rows)


def parts_of(result: dict[str, Any]) -> dict[str, float]:
    """part -> bytes"""
    found = result.get("parts", {})
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float) and value > 0}


def room_of(result: dict[str, Any]) -> float | None:
    room = result.get("available")
    return float(room) if isinstance(room, int | float) else None


def bar(parts: dict[str, float], room: float | None) -> str:
    """Widths are shares of the memory there is, or of the whole where that is more or unknown."""
    whole = max(sum(parts.values()), room or 0.0)
    pieces, keys = [], []
    for number, (name, size) in enumerate(parts.items()):
        colour = COLOURS[number % len(COLOURS)]
        opacity = 1 if number < len(COLOURS) else 0.5
        style = f"background:{colour};opacity:{opacity}"
        pieces.append(f'<span style="{style};width:{100 * size / whole:.2f}%" title="{escape(name)}"></span>')
        keys.append(f'<span><i style="{style}"></i>{escape(name)} {mebibytes(size)}</span>')
    total = mebibytes(sum(parts.values())) + (f" / {mebibytes(room)}" if room else "")
    return f'<div class="peft-bar">{"".join(pieces)}</div><div class="peft-key">{"".join(keys)}<b>{total}</b></div>'


def mebibytes(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"
