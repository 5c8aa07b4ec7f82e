"""Line charts as inline SVG, drawn by arithmetic: no script, no font and no picture has to be loaded to see them.

Colours come from CSS variables (`--series-0`, `--ink`, `--line`, ...) of the page around them, so a chart follows the
page into dark mode. Every drawn point answers to the pointer with its values (an SVG `<title>`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 500, 210  # of the view box; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 14, 28
MOST_POINTS = 400  # drawn per series

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line. `colour` is any CSS colour."""

    name: str
    points: Sequence[Point]
    colour: str = "var(--series-0)"
    width: float = 2.0


@dataclass(frozen=True)
class Mark:
    """A single labelled point, or with `x` None a dashed line across."""

    name: str
    y: float
    x: float | None = None
    colour: str = "var(--series-1)"


def line_chart(
    series: Sequence[Series], marks: Sequence[Mark] = (), *, label: str, number: Callable[[float], str] | None = None
) -> str:
    """An SVG of y over tokens seen. `label` names it for screen readers; `number` formats y. Empty without any point."""
    shown = number or compact
    drawn = [Series(line.name, thin(line.points), line.colour, line.width) for line in series if line.points]
    xs = [x for line in drawn for x, _ in line.points] + [mark.x for mark in marks if mark.x is not None]
    ys = [y for line in drawn for _, y in line.points] + [mark.y for mark in marks]
    if not xs:
        return ""
    x_ticks, y_ticks = ticks(0.0, max(xs), 6), ticks(min(ys), max(ys), 5)
    low, high = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))
    x_end = max(xs) or 1.0

    def px(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * x / x_end

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - low) / ((high - low) or 1.0)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label, quote=True)}">']
    for y in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{py(y) + 4:.1f}" text-anchor="end">{shown(y)}</text>')
    for x in x_ticks:
        if x <= x_end:
            anchor = "middle" if px(x) < WIDTH - RIGHT - 14 else "end"
            parts.append(
                f'<text class="tick" x="{px(x):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="{anchor}">{compact(x)}</text>'
            )
    for mark in marks:
        if mark.x is None:
            parts.append(
                f'<line class="reference" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(mark.y):.1f}" y2="{py(mark.y):.1f}"/>'
                f'<text class="tick" x="{WIDTH - RIGHT}" y="{py(mark.y) - 6:.1f}" text-anchor="end">'
                f"{escape(mark.name)} {shown(mark.y)}</text>"
            )
    for line in drawn:
        path = "M" + "L".join(f"{px(x):.1f} {py(y):.1f}" for x, y in line.points)
        parts.append(f'<path d="{path}" fill="none" stroke="{line.colour}" stroke-width="{line.width}"/>')
        for x, y in line.points:
            title = f"{line.name}: {shown(y)} after {compact(x)} tokens"
            parts.append(
                f'<circle class="hit" cx="{px(x):.1f}" cy="{py(y):.1f}" r="5" style="--c:{line.colour}">'
                f"<title>{escape(title)}</title></circle>"
            )
    for mark in marks:
        if mark.x is not None:
            parts.append(
                f'<circle cx="{px(mark.x):.1f}" cy="{py(mark.y):.1f}" r="5" fill="{mark.colour}">'
                f"<title>{escape(mark.name)}: {shown(mark.y)}</title></circle>"
                f'<text class="value" x="{px(mark.x) - 9:.1f}" y="{py(mark.y) - 10:.1f}" text-anchor="end" '
                f'fill="{mark.colour}">{shown(mark.y)}</text>'
            )
    return "".join(parts) + "</svg>"


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten apart) that enclose [low, high]."""
    if high <= low:
        high = low + (abs(low) or 1.0) * 0.1
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def thin(points: Sequence[Point]) -> list[Point]:
    """At most about `MOST_POINTS` of the points: evenly picked, the last one always."""
    stride = max(1, math.ceil(len(points) / MOST_POINTS))
    kept = list(points[::stride])
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


def compact(number: float) -> str:
    """12345678 -> 12.3M, 0.00042 -> 0.00042"""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}"
