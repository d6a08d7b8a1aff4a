"""Tables on a terminal, where a Chinese character is two columns wide."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


def width(text: str) -> int:
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def columns(rows: Sequence[Sequence[str]]) -> str:
    """The rows in columns as wide as their widest cell."""
    widths = [max(width(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell + " " * (w - width(cell)) for cell, w in zip(row, widths)).rstrip() for row in rows)
    return "\n".join(lines)
