"""Pages from Jinja templates: everything is escaped unless it is marked as markup."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from jaxinterp.report.style import EARLY_SCRIPT, SCRIPT, STYLE
from jaxinterp.report.text import DASH, Number, count, finite, fixed, number, percent, plain, token_html


def render(template: str, **values: Any) -> str:
    """The template of that name in `report/templates`, with its values; raises where one is missing."""
    return _environment.get_template(template).render(values)


def rate(density: Number) -> str:
    """A firing frequency as percent with two significant digits: frequencies span five decades."""
    return number(100 * density, 2) + "\u202f%" if finite(density) else number(density)


def shown(value: object) -> str:
    """A value of a table: words, a whole number, or three digits; an en dash where there is none."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return count(value)
    if finite(value):
        return fixed(value, 3) if 0.01 <= abs(value) < 1000 else number(value, 3)
    return DASH if value is None else plain(str(value))


def _columns_of_words(rows: Any) -> set[str]:
    return {name for name in rows[0] if any(isinstance(row.get(name), str) for row in rows)}


def _share(value: Number, scale: Number) -> int:
    return round(100 * min(abs(value) / scale, 1)) if scale > 0 else 0


def _top_token(page: Any) -> Markup:
    first = page.contexts[0] if page.contexts else None
    return Markup(token_html(first.tokens[first.peak], alone=True) if first else token_html(""))


_environment = Environment(
    loader=PackageLoader("jaxinterp.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=False,
)
_environment.filters |= {
    "plain": lambda text: Markup(plain(text)),
    "markup": Markup,
    "token": lambda token: Markup(token_html(token, alone=True)),
    "top_token": _top_token,
    "columns_of_words": _columns_of_words,
    "shown": lambda value: Markup(shown(value)),
    "exact": lambda value: repr(float(value)) if finite(value) else "",
    "share": _share,
    "rate": rate,
    "count": count,
    "fixed": fixed,
    "number": number,
    "percent": percent,
}
_environment.tests["finite"] = finite
_environment.globals |= {"style": Markup(STYLE), "early_script": Markup(EARLY_SCRIPT), "script": Markup(SCRIPT)}
