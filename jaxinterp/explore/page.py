"""The files of the page, from the package."""

from importlib.resources import files

SCRIPTS = ("data.js", "parts.js", "app.js")
PAGE = {"/": ("index.html", "text/html"), "/app.css": ("app.css", "text/css")} | {
    f"/{name}": (name, "text/javascript") for name in SCRIPTS
}
"""Address -> (file, kind): all that is ever sent as a file."""


def asset(name: str) -> str:
    """The text of a file of the page; of app.css with the report's colours before it."""
    text = files("jaxinterp.explore").joinpath("pages", name).read_text(encoding="utf-8")
    if name != "app.css":
        return text
    return files("jaxinterp.report").joinpath("palette.css").read_text(encoding="utf-8") + text
