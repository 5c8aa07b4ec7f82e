"""Parts of the pages that are written for people: sections, tables, charts with their legends. Strings in, strings out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources

from pipeline.report.charts import Axis, Mark, Moment, Series, compact, plot

TOKENS = Axis("tokens trained on")


def page(title: str, body: str, *, again_s: int | None = None) -> str:
    """A whole page with its style and script; nothing has to be loaded to see it. `again_s`: it is written anew, look again so often."""
    style, script = (resources.files("pipeline.report").joinpath(name).read_text() for name in ("page.css", "page.js"))
    refresh = "" if again_s is None else f'<meta http-equiv="refresh" content="{again_s}">'
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{refresh}'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n<body><main>{body}</main>"
        f"<script>{script}</script></body></html>\n"
    )


def section(title: str, content: str, aside: str = "") -> str:
    """Nothing where there is no content. `aside` stands beside the title."""
    return f"<section><div class=head><h2>{title}</h2>{aside}</div>{content}</section>" if content else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Cells are HTML; the first `left` columns are words."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=left' if index < left else ''}>{cell}</{tag}>" for index, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{line(head, "th")}</tr></thead><tbody>{body}</tbody></table></div>'


def tiles(cells: Iterable[tuple[str, str, str]]) -> str:
    """Name, value and a note each."""
    made = (
        f'<div class="tile"><span>{escape(name)}</span><strong>{escape(value)}</strong><small>{escape(note)}</small></div>'
        for name, value, note in cells
    )
    return f'<div class="tiles">{"".join(made)}</div>'


def figure(
    title: str,
    note: str,
    series: Mapping[Axis, Sequence[Series]] | Sequence[Series],
    marks: Sequence[Mark] = (),
    moments: Mapping[Axis, Sequence[Moment]] | None = None,
    *,
    y: Axis | None = None,
) -> str:
    """A chart with its caption and legend: one plot for each x axis, of which the page shows one. Empty without points.

    `note` is the title of the y axis.
    """
    views = series if isinstance(series, Mapping) else {TOKENS: series}
    up = y or Axis(note)
    plots = "".join(
        plot(lines, marks, (moments or {}).get(axis, ()), label=f"{title} over {axis.title}", x=axis, y=up)
        for axis, lines in views.items()
    )
    if not plots:
        return ""
    drawn = [line for line in next(iter(views.values())) if line.points]
    key = _legend(drawn, marks, up)
    return f"<figure><figcaption>{escape(title)}</figcaption>{key}{plots}</figure>"


def _legend(drawn: Sequence[Series], marks: Sequence[Mark], y: Axis) -> str:
    """With the last value of each line, which so needs no place in the plot."""
    shown = drawn if len(drawn) <= 6 else [drawn[0], drawn[-1]]  # shades in order: the ends say it
    words = [
        f'<span><i style="background:{line.colour}"></i>{escape(line.name)} <em>{escape(y.number(line.points[-1][1]))}</em></span>'
        for line in shown
    ]
    words += [f'<span><i class="dashes"></i>{escape(mark.name)} <em>{compact(mark.y)}</em></span>' for mark in marks]
    return f'<div class="legend">{"".join(words)}</div>'
