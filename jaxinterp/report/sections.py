"""A page of sections: paragraphs, tables and charts, for experiments that compare instead of showing features."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxinterp.report.shell import card, document, facts_list, save
from jaxinterp.report.text import DASH, count, finite, fixed, number, plain

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Chart:
    """An SVG chart from `jaxinterp.report.plots` or `scatter`, with a title and a note for its card."""

    title: str
    note: str
    svg: str


@dataclass(frozen=True)
class Section:
    """Paragraphs of plain text, then a table (columns: the keys of the first row), then charts two by two."""

    title: str
    text: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()
    charts: tuple[Chart, ...] = ()
    wide: bool = False
    """Charts one below the other, each as wide as the page."""


def write_page(
    path: str | Path, *, title: str, subtitle: str, summary: str, sections: Sequence[Section], facts: Mapping[str, str]
) -> Path:
    """Write the page as one HTML file and return its path; `summary` is one or two sentences that say what came out."""
    bodies = [(f"section-{index}", one.title, _body(one)) for index, one in enumerate(sections)]
    run = ("run", "The run", facts_list(facts))
    return save(document([*bodies, run], title=title, subtitle=subtitle, summary=plain(summary)), path)


def _body(section: Section) -> str:
    parts = [f'<p class="lede">{plain(paragraph)}</p>' for paragraph in section.text]
    if section.rows:
        parts.append(table(section.rows))
    if section.charts:
        cards = "".join(card(plain(one.title), plain(one.note), one.svg) for one in section.charts)
        parts.append(f'<div class="{"wide" if section.wide else "two"}">{cards}</div>')
    return "".join(parts)


def table(rows: Sequence[Row]) -> str:
    """Rows as an HTML table: words to the left, numbers to the right, an en dash where a row has nothing."""
    names = list(rows[0])
    words = {name for name in names if any(isinstance(row.get(name), str) for row in rows)}
    heads = "".join(f'<th scope="col"{_left(name in words)}>{plain(name)}</th>' for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td{_left(name in words)}>{_shown(row.get(name))}</td>" for name in names) + "</tr>"
        for row in rows
    )
    return (
        '<div class="card scroll" style="padding:8px 0 4px"><table class="board">'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _left(words: bool) -> str:
    return ' class="words" style="text-align:left"' if words else ""


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return count(value)
    if finite(value):
        return fixed(value, 3) if 0.01 <= abs(value) < 1000 else number(value, 3)
    return DASH if value is None else plain(str(value))
