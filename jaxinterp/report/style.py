"""The style sheet and the scripts of the pages, read from the files beside this one.

A page is complete without the script: it only shows one feature at a time, sorts the index, and listens to the keys.
"""

from importlib.resources import files


def asset(name: str) -> str:
    """The text of a file of this package."""
    return files("jaxinterp.report").joinpath(name).read_text(encoding="utf-8")


LEVELS = 9
"""Shades of a token's background: classes a1 to a9 above zero, n1 to n9 below."""

_SHADES = "\n".join(
    f".snippet .a{level}{{background:rgb(var(--heat)/{0.06 + 0.082 * level:.2f})}}"
    f".snippet .n{level}{{background:rgb(var(--cool)/{0.06 + 0.066 * level:.2f})}}"
    for level in range(1, LEVELS + 1)
)

STYLE = asset("palette.css") + asset("report.css").replace("HEAT", _SHADES)

# Set before the body is drawn, so that the page does not first show every feature and then hide all but one.
EARLY_SCRIPT = "document.documentElement.classList.add('js')"

SCRIPT = asset("report.js")
