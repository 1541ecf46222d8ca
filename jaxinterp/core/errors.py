"""Mistakes that the user can mend, told in one line."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake in what was asked for: the message names the field, the value and the way out.

    Raised before compute is spent. The command line prints the message without a traceback and exits with code 2.
    """


def suggest(name: str, known: Iterable[str], most: int = 3) -> str:
    """` Did you mean 'a' or 'b'?` with the known names nearest to `name`; the empty string where none is near."""
    near = get_close_matches(name, list(known), n=most, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(match) for match in near)}?" if near else ""


def first_line(error: Exception) -> str:
    """What an error of another library says, in one line: its kind, and the beginning of its words."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
