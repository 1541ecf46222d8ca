"""What every page has around its content: head, title, navigation, footer, cards; and how a page gets onto the disk.

A content security policy in the file forbids every outside request, so that a mistake shows as something missing here
and not as a request from the reader's machine.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxinterp.report.style import EARLY_SCRIPT, SCRIPT, STYLE
from jaxinterp.report.text import plain
from jaxinterp.storage.files import write_text

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def document(
    sections: Sequence[tuple[str, str, str]], *, title: str, subtitle: str, summary: str, tiles: str = ""
) -> str:
    """A whole page. Sections are (anchor, title, body); `summary`, `tiles` and bodies are HTML, the rest plain text."""
    header = f'<div class="tiles">{tiles}</div>' if tiles else ""
    links = "".join(f'<a href="#{name}">{plain(title)}</a>' for name, title, _ in sections)
    body = "".join(f'<section id="{name}"><h2>{plain(title)}</h2>{text}</section>' for name, title, text in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{plain(title)}</title><style>{STYLE}</style><script>{EARLY_SCRIPT}</script></head>\n<body>"
        f'<header class="top"><div class="kicker">jaxinterp report</div><h1>{plain(title)}</h1>'
        f'<p class="subtitle">{plain(subtitle)}</p><p class="summary">{summary}</p>'
        f"{header}</header>"
        f'<nav class="bar" aria-label="Sections"><div>{links}</div></nav>\n<main>{body}</main>'
        "<footer>Written by jaxinterp. This file is complete in itself: it loads nothing.</footer>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def card(title: str, note: str, body: str) -> str:
    """A framed box with a title; HTML."""
    return f'<div class="card"><h3>{title}<small>{note}</small></h3>{body}</div>'


def facts_list(facts: Mapping[str, str]) -> str:
    """What is known of the run, as HTML; a fact named "command" gets a line of its own."""
    if not facts:
        return '<p class="empty">Nothing was recorded about the run.</p>'
    entries = "".join(
        f"<div{' class=wide' if name == 'command' else ''}><dt>{plain(name)}</dt><dd>{plain(value)}</dd></div>"
        for name, value in facts.items()
    )
    return f'<dl class="run card">{entries}</dl>'


def save(text: str, path: str | Path) -> Path:
    """Write a page and return its path; a file of that name is replaced in one step. Folders on the way are created."""
    return write_text(path, text)
