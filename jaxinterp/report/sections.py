"""A page of sections: paragraphs, tables and charts, for experiments that compare instead of showing features."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from jaxinterp.report.templates import render
from jaxinterp.report.text import plain
from jaxinterp.storage.files import write_text

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
    anchors = [(f"section-{index}", one.title) for index, one in enumerate(sections)] + [("run", "The run")]
    text = render(
        "sections.html",
        title=title,
        subtitle=subtitle,
        summary=Markup(plain(summary)),
        sections=sections,
        facts=facts,
        anchors=anchors,
    )
    return write_text(path, text)
