"""Charts as SVG text, with no library: they scale, need no font files, and show Chinese as it is."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import floor, isfinite, log10
from typing import NamedTuple

WIDTH, HEIGHT = 720, 360
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 40, 46
FONT = "system-ui, 'Noto Sans CJK SC', 'PingFang SC', 'Microsoft YaHei', sans-serif"
COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed")
TICKS = 5


class Line(NamedTuple):
    name: str
    points: Sequence[tuple[float, float]]
    faint: bool = False
    dots: bool = False
    joined: bool = True


def chart(title: str, lines: Sequence[Line], x_name: str, ticks: Sequence[tuple[float, str]] | None = None) -> str:
    """A chart of lines over one axis. Lines without points, and points that are not finite, are left out.

    `ticks` are the marks of the axis, for one that is not of plain numbers; default: round numbers.
    """
    finite = [line._replace(points=[(x, y) for x, y in line.points if isfinite(y)]) for line in lines]
    lines = [line for line in finite if line.points]
    xs = [x for line in lines for x, _ in line.points] or [0.0]
    ys = [y for line in lines for _, y in line.points] or [0.0]
    x_low, x_high = min(xs), max(xs)
    heights = steps(min(ys), max(ys))
    y_low, y_high = heights[0], heights[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low or 1)
        up = (y - y_low) / (y_high - y_low or 1)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = canvas(title, HEIGHT)
    for tick in heights:
        _, y = place(x_low, tick)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e5e7eb"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#555">{tick:.4g}</text>')
    for tick, name in ticks or [(tick, f"{tick:.4g}") for tick in steps(x_low, x_high)]:
        if x_low <= tick <= x_high:
            x, _ = place(tick, y_low)
            parts.append(
                f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle" fill="#555">{escape(name)}</text>'
            )
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end" fill="#555">{escape(x_name)}</text>')
    for number, line in enumerate(lines):
        parts += drawn(line, COLOURS[number % len(COLOURS)], place, number)
    return "\n".join([*parts, "</svg>"])


def canvas(title: str, height: int) -> list[str]:
    """A white page with its title; what follows must close it."""
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'font-family="{FONT}" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="{LEFT}" y="24" font-size="15" font-weight="600" fill="#111">{escape(title)}</text>',
    ]


def drawn(line: Line, colour: str, place, number: int) -> list[str]:
    opacity = 0.3 if line.faint else 1
    path = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in line.points)
    parts = []
    if line.joined:
        parts.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="1.8" opacity="{opacity}" points="{path}"/>'
        )
    if line.dots or len(line.points) == 1:
        for point in line.points:
            x, y = place(*point)
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}" opacity="{opacity}"/>')
    x = WIDTH - RIGHT - 150 * (number + 1) + 20
    parts.append(f'<rect x="{x}" y="16" width="10" height="10" fill="{colour}" opacity="{opacity}"/>')
    parts.append(f'<text x="{x + 15}" y="25" fill="#333">{escape(line.name)}</text>')
    return parts


def steps(low: float, high: float) -> list[float]:
    """Round numbers that enclose the range."""
    if high <= low:
        high, low = low + (abs(low) * 0.1 or 1), low - (abs(low) * 0.1 or 1)
    rough = (high - low) / TICKS
    unit = 10 ** floor(log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    first = floor(low / step)
    found = [first * step]
    while found[-1] < high - 1e-9 * step:
        found.append((first + len(found)) * step)
    return found
