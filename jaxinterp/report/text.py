"""Strings and numbers as the report shows them: escaped, and with nothing invisible left.

A token may hold anything: markup, quotes, control characters, bidirectional overrides, half of a character. Whatever a
browser would act on or hide is escaped or shown as a glyph: a token can neither break the page nor be invisible.
"""

import html
import math
import unicodedata
from numbers import Real
from typing import TypeGuard

Number = float | int

DASH = "–"
_GLYPHS = {"\n": "↵", "\t": "⇥", "\r": "␍", "\x7f": "␡", "\u00a0": "⍽", "\u00ad": "\\xad"}
# Control, format, surrogate, private and unassigned characters, line separators: invisible, or acted upon by a browser.
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"}
_JOINER = "\u200d"
_SUPERSCRIPT = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
_MOST_DOTS = 12


def token_html(token: str, *, alone: bool = False) -> str:
    """A token as HTML. Spaces are dots where they matter: in runs, in blank tokens, at the ends of a token shown alone.

    Newline, tab and other characters that cannot be seen are shown as dimmed glyphs or escapes.
    """
    if not token:
        return _glyph("∅")
    if token.isascii() and token.isprintable() and "  " not in token and not alone and token != " ":
        return html.escape(token)
    edges = len(token) - len(token.lstrip(" ")), len(token.rstrip(" "))
    blank = not token.strip(" ")
    pieces: list[str] = []
    position = 0
    while position < len(token):
        character = token[position]
        if character == " ":
            end = position
            while end < len(token) and token[end] == " ":
                end += 1
            at_edge = alone and (position < edges[0] or position >= edges[1])
            pieces.append(_dots(end - position) if end - position > 1 or blank or at_edge else " ")
            position = end
            continue
        joins = character == _JOINER and 0 < position < len(token) - 1 and not token[position + 1].isascii()
        pieces.append(html.escape(character) if joins else _character(character))
        position += 1
    return "".join(pieces)


def plain(text: str) -> str:
    """Text as HTML, for titles, labels and attributes: escaped, hidden characters but the space before % as escapes."""
    return "".join(
        character if character in " \n\u202f" else html.escape(_shown(character) or character)
        for character in str(text)
    )


def number(value: Number | None, digits: int = 3) -> str:
    """A number with `digits` significant digits; an en dash for None; powers of ten outside [1e-3, 1e5)."""
    return _significant(float(value), digits) if finite(value) else _special(value)


def fixed(value: Number | None, decimals: int) -> str:
    """A number with so many decimals; an en dash for None."""
    return _minus(f"{value:,.{decimals}f}") if finite(value) else _special(value)


def percent(value: Number | None, decimals: int = 1) -> str:
    """A fraction as percent; an en dash for None."""
    return _minus(f"{100 * value:,.{decimals}f}") + "\u202f%" if finite(value) else _special(value)


def count(value: Number | None) -> str:
    """A count with thousands separators; an en dash for None."""
    return fixed(value, 0)


def short_count(value: Number | None) -> str:
    """A count in thousands, millions or billions, for axes and tiles: 200k, 1.5M."""
    if not finite(value):
        return _special(value)
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return _minus(f"{value / size:.3g}{suffix}")
    return _minus(f"{value:.3g}")


def power_of_ten(exponent: int) -> str:
    """10 to an integer power, with superscript digits."""
    return "10" + str(exponent).translate(_SUPERSCRIPT)


def finite(value: object) -> TypeGuard[Number]:
    """Whether `value` is a number that can be drawn and compared: not None, not NaN, not infinite."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _special(value: Number | None) -> str:
    """What is shown for a value that is not finite."""
    if value is None:
        return DASH
    return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _significant(value: Number, digits: int) -> str:
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        return _minus(f"{value:,.{decimals}f}")
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{_minus(mantissa)}×{power_of_ten(int(exponent))}"


def _dots(length: int) -> str:
    return _glyph("·" * length if length <= _MOST_DOTS else "·" * (_MOST_DOTS - 1) + "…")


def _glyph(text: str) -> str:
    return f"<span class=w>{text}</span>"


def _shown(character: str) -> str:
    """What to show for a character that cannot be seen; empty for one that can."""
    if character in _GLYPHS:
        return _GLYPHS[character]
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if unicodedata.category(character) not in _HIDDEN:
        return ""
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _character(character: str) -> str:
    shown = _shown(character)
    return _glyph(shown) if shown else html.escape(character)
