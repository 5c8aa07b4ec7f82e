"""Charts as HTML and stretched SVG: no script, no font and no picture has to be loaded to see them, at any width.

The lines are an SVG of 1000 x 1000 units that the browser stretches over the plot (strokes keep their width), everything with letters is
HTML around it, placed in per cent. So text has its size on a telephone and on a wide screen, and none lies over a line. Colours
come from CSS variables of the page (`--series-0`, `--ink`, `--line`, ...), which follow it into dark mode. Each chart carries its
values as JSON: page.js answers the pointer with them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

UNITS = 1000  # of the view box, both ways
MOST_POINTS = 400  # drawn per series

Point = tuple[float, float]
Number = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """One line. `colour` is any CSS colour; `dots` shows every point (few of them)."""

    name: str
    points: Sequence[Point]
    colour: str = "var(--series-0)"
    width: float = 2.0
    dots: bool = False
    line: bool = True


@dataclass(frozen=True)
class Mark:
    """A dashed line across at y, named in the legend."""

    name: str
    y: float


@dataclass(frozen=True)
class Moment:
    """Something that happened at x: a line from top to bottom, or with `small` a stroke on the axis."""

    name: str
    x: float
    small: bool = False


@dataclass(frozen=True)
class Axis:
    """`unit` is the axis' title; `number` formats its ticks. `key` tells the page which of several axes is meant."""

    title: str
    number: Number = field(default=lambda value: compact(value))
    key: str = "tokens"
    zero: bool = True  # begins at 0


def plot(
    series: Sequence[Series],
    marks: Sequence[Mark] = (),
    moments: Sequence[Moment] = (),
    *,
    label: str,
    x: Axis,
    y: Axis,
) -> str:
    """One plot with its ticks and axis titles. `label` names it for screen readers. Empty without any point."""
    drawn = [
        Series(line.name, thin(line.points), line.colour, line.width, line.dots, line.line)
        for line in series
        if line.points
    ]
    xs = [each for line in drawn for each, _ in line.points]
    ys = [each for line in drawn for _, each in line.points]
    if not xs:
        return ""
    ys += [mark.y for mark in marks]
    if min(ys) == max(ys):  # what is constant lies in the middle
        ys += [0.9 * ys[0], 1.1 * ys[0]] if ys[0] else [1.0]
    x_low, x_high = (0.0 if x.zero else min(xs)), max(xs)
    if x_high <= x_low:
        x_high = x_low + 1.0
    x_ticks, y_ticks = _x_ticks(x_low, x_high, x), ticks(min(ys), max(ys), 5)
    y_low, y_high = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))

    def px(value: float) -> float:
        return UNITS * (value - x_low) / (x_high - x_low)

    def py(value: float) -> float:
        return UNITS * (y_high - value) / ((y_high - y_low) or 1.0)

    shapes = [f'<line class="grid" x1="0" x2="{UNITS}" y1="{py(each):.1f}" y2="{py(each):.1f}"/>' for each in y_ticks]
    for moment in moments:
        if x_low <= moment.x <= x_high:
            top, kind = (UNITS - 40, "small") if moment.small else (0, "moment")
            shapes.append(
                f'<line class="{kind}" x1="{px(moment.x):.1f}" x2="{px(moment.x):.1f}" y1="{top}" y2="{UNITS}"/>'
            )
    shapes += [
        f'<line class="reference" x1="0" x2="{UNITS}" y1="{py(each.y):.1f}" y2="{py(each.y):.1f}"/>' for each in marks
    ]
    dots = []
    for line in drawn:
        if line.line and len(line.points) > 1:
            path = "M" + "L".join(f"{px(a):.1f} {py(b):.1f}" for a, b in line.points)
            shapes.append(f'<path d="{path}" stroke="{line.colour}" stroke-width="{line.width}"/>')
        if line.dots or len(line.points) == 1:
            dots += [
                f'<i class="dot" style="left:{px(a) / 10:.2f}%;top:{py(b) / 10:.2f}%;background:{line.colour}"></i>'
                for a, b in line.points
            ]
    words = [f'<b class="y" style="top:{py(each) / 10:.2f}%">{escape(y.number(each))}</b>' for each in y_ticks]
    words += [
        f'<b class="x{_edge(px(each))}" style="left:{px(each) / 10:.2f}%">{escape(x.number(each))}</b>'
        for each in x_ticks
    ]
    values = {
        "x": [x_low, x_high],
        "y": [y_low, y_high],
        "series": [
            [line.name, line.colour, [_short(a) for a, _ in line.points], [_short(b) for _, b in line.points]]
            for line in drawn
        ],
        "moments": [[moment.name, _short(moment.x)] for moment in moments if x_low <= moment.x <= x_high],
    }
    data = escape(json.dumps(values, separators=(",", ":")), quote=True)
    return (
        f'<div class="plot {x.key}" data-axis="{x.key}" data-values="{data}"><span class="title">{escape(y.title)}</span>'
        f'<div class="area" tabindex="0" role="img" aria-label="{escape(label, quote=True)}">'
        f'<svg viewBox="0 0 {UNITS} {UNITS}" preserveAspectRatio="none" aria-hidden="true">{"".join(shapes)}</svg>'
        f'{"".join(dots)}{"".join(words)}</div><span class="title below">{escape(x.title)}</span></div>'
    )


def histogram(counts: Sequence[tuple[str, int]], *, label: str, x_title: str, y_title: str, colour: str) -> str:
    """Bars with a name each, in order; every other name is written where they are many."""
    most = max((count for _, count in counts), default=0)
    if not most:
        return ""
    step = math.ceil(len(counts) / 6)
    bars = "".join(
        f'<i style="height:{100 * count / most:.1f}%;background:{colour}" title="{escape(name, quote=True)}: {count:,}"></i>'
        for name, count in counts
    )
    names = "".join(f"<b>{escape(name) if index % step == 0 else ''}</b>" for index, (name, _) in enumerate(counts))
    return (
        f'<div class="plot bars"><span class="title">{escape(y_title)}, at most {most:,} in a bar</span>'
        f'<div class="columns" role="img" aria-label="{escape(label, quote=True)}">{bars}</div>'
        f'<div class="names">{names}</div><span class="title below">{escape(x_title)}</span></div>'
    )


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


def time_ticks(high: float, about: int) -> list[float]:
    """Seconds from 0 on that are round as times: 10 s, 5 min, 6 h, 2 days."""
    steps = [1, 2, 5, 10, 20, 30, *(60 * n for n in (1, 2, 5, 10, 20, 30)), *(3600 * n for n in (1, 2, 3, 6, 12))]
    steps += [86400 * factor * 10**power for power in range(4) for factor in (1, 2, 5)]
    step = next((each for each in steps if high / each <= about), steps[-1])
    return [float(index * step) for index in range(int(high // step) + 1)]


def clock(seconds: float) -> str:
    """0 -> '0', 95 -> '1:35 min', 7200 -> '2:00 h', 200000 -> '2.3 d'."""
    total = round(seconds)
    if total < 60:
        return f"{total} s" if total else "0"
    if total < 3600:
        return f"{total // 60}:{total % 60:02d} min"
    if total < 48 * 3600:
        return f"{total // 3600}:{total % 3600 // 60:02d} h"
    return f"{total / 86400:.3g} d"


def thin(points: Sequence[Point]) -> list[Point]:
    """At most about `MOST_POINTS` of the points: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= MOST_POINTS:
        return list(points)
    kept: list[Point] = [points[0]]
    stretch = math.ceil(2 * len(points) / MOST_POINTS)
    for first in range(0, len(points), stretch):
        part = points[first : first + stretch]
        low, high = min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])
        kept += sorted({low, high})
    kept.append(points[-1])
    return list(dict.fromkeys(kept))


def compact(number: float) -> str:
    """12345678 -> 12.3M, 0.00042 -> 0.00042"""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}"


def _x_ticks(low: float, high: float, axis: Axis) -> list[float]:
    if axis.number is clock:
        return time_ticks(high, 5)
    return [each for each in ticks(low, high, 5) if low <= each <= high * (1 + 1e-9)]


def _edge(place: float) -> str:
    """Words at the ends of the axis stay inside."""
    return " first" if place < 30 else " last" if place > UNITS - 60 else ""


def _short(value: float) -> float:
    return float(f"{value:.7g}")
