"""Docstrings as the site shows them: a paragraph that is an equation, or code without prompts, keeps its lines."""

import re
from inspect import cleandoc

from griffe import Extension

SECTION = re.compile(r"^\s*[A-Z][\w ]*:$")
WORDS = re.compile(r"\.$|\.\s+[A-Z]")


def is_formula(paragraph: str) -> bool:
    """Lines with `=`, `<-` or a bracketed index and without a sentence."""
    lines = paragraph.split("\n")
    shown = re.search(r"[^=<>]=[^=]|<-|->|\w\[", paragraph) is not None
    return (
        shown
        and not WORDS.search(paragraph)
        and not SECTION.match(lines[0])
        and not lines[0].lstrip().startswith(">>>")
    )


def with_fences(text: str) -> str:
    """The docstring with a fence around each such paragraph behind its first line."""
    text = re.sub(r"^Example:$", "Examples:", cleandoc(text), flags=re.MULTILINE)
    text = re.sub(r"\n+(?=(?:Args|Returns|Raises|Examples):\n)", "\n\n", text)  # a section begins behind an empty line
    first, *others = re.split(r"\n\s*\n", text)
    shown = [first]
    for paragraph in others:
        lines = paragraph.split("\n")
        head = lines[:1] if lines[0] == "Examples:" else []  # what stands under it may be code
        body = lines[len(head) :]
        code = head and body and not body[0].lstrip().startswith(">>>")
        if body and (code or is_formula("\n".join(body))):
            indent = " " * min(len(line) - len(line.lstrip()) for line in body if line.strip())
            body = [f"{indent}```{'python' if head else 'text'}", *body, f"{indent}```"]
        shown.append("\n".join([*head, *body]))
    return "\n\n".join(shown)


class Equations(Extension):
    """The griffe extension."""

    def on_instance(self, *, obj, **_) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = with_fences(obj.docstring.value)
