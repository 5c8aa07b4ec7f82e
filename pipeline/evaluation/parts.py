"""Parts of the pages that are written for people: sections, tables, charts with their legends. Strings in, strings out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources

from pipeline.evaluation.charts import Mark, Series, line_chart


def page(title: str, body: str) -> str:
    """A whole page with its style; nothing has to be loaded to see it."""
    style = resources.files("pipeline.evaluation").joinpath("report.css").read_text()
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n<body><main>{body}</main></body></html>\n"
    )


def section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=left' if index < left else ''}>{cell}</{tag}>" for index, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{line(head, "th")}</tr></thead><tbody>{body}</tbody></table></div>'


def figure(title: str, note: str, series: list[Series], marks: list[Mark]) -> str:
    chart = line_chart(series, marks, label=f"{title} over tokens seen")
    if not chart:
        return ""
    drawn = [(line.name, line.colour) for line in series] + [(m.name, m.colour) for m in marks if m.x is not None]
    if len(drawn) > 6:  # shades in order: the ends say it
        drawn = [drawn[0], drawn[-1]]
    legend = "".join(f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for name, colour in drawn)
    key = f'<div class="legend">{legend}</div>' if len(drawn) > 1 else ""
    return f"<figure><figcaption>{escape(title)} <small>{escape(note)}</small></figcaption>{key}{chart}</figure>"
