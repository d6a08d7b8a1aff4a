"""Curves as SVG text: no library, no script, and the reader's own fonts and colours."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

WIDTH, HEIGHT = 520, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 34
COLOURS = ("#2f6fde", "#d9480f", "#2b8a3e", "#9c36b5", "#c2255c", "#0b7285", "#a07500", "#5f3dc4")
LINE = 18  # height of a line of the legend

Points = Sequence[tuple[float, float]]


def curves(lines: Sequence[tuple[str, Points]], x_name: str) -> str:
    """A line for each (name, points), with a legend below. Points that are not finite leave a gap out."""
    lines = [(name, [(x, y) for x, y in points if math.isfinite(y)]) for name, points in lines]
    every = [point for _, points in lines for point in points]
    if not every:
        return ""
    x_low, x_high = span([x for x, _ in every])
    y_low, y_high = span([y for _, y in every])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT) + LEFT
        return across, HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in ticks(y_low, y_high):
        _, y = place(x_low, tick)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="currentColor" stroke-opacity=".15"/>')
        parts.append(label(LEFT - 6, y + 4, f"{tick:.4g}", "end"))
    for tick in ticks(x_low, x_high):
        x, _ = place(tick, y_low)
        parts.append(label(x, HEIGHT - BOTTOM + 16, f"{tick:.4g}", "middle"))
    parts.append(label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 3, x_name, "middle"))
    for number, (name, points) in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        path = "L".join("{:.1f} {:.1f}".format(*place(*point)) for point in points)
        if len(points) > 1:
            parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        elif points:
            x, y = place(*points[0])
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
        y = HEIGHT + LINE * number + 12
        parts.append(f'<path d="M{LEFT} {y - 4}h22" stroke="{colour}" stroke-width="3"/>' + label(LEFT + 28, y, name))
    height = HEIGHT + LINE * len(lines) + 6
    size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    return f'<svg {size} role="img" font-size="12" fill="currentColor">{"".join(parts)}</svg>'


def label(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def span(values: Sequence[float]) -> tuple[float, float]:
    """Their range, and some room where it is empty."""
    low, high = min(values), max(values)
    room = (high - low) * 0.03 or abs(low) * 0.1 or 1.0
    return low - room, high + room


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers in the range."""
    raw = (high - low) / about
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw * 0.999)
    first = math.ceil(low / step)
    return [round(step * i, 12) for i in range(first, math.floor(high / step) + 1)]


def smooth(points: Points, share: float = 0.9) -> list[tuple[float, float]]:
    """A running mean of about 1 / (1 - share) points."""
    found: list[tuple[float, float]] = []
    for x, y in points:
        found.append((x, y if not found else share * found[-1][1] + (1 - share) * y))
    return found
