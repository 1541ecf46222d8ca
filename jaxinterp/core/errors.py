"""Mistakes that the user can mend, told in one line."""

import errno
import os
from collections.abc import Iterable, Iterator
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake in what was asked for: the message names the field, the value and the way out.

    Raised before compute is spent. The command line prints the message without a traceback and exits with code 2.

    Example:
      >>> try:
      ...     load("tinny")
      ... except UserError as error:
      ...     print(error)
      no model 'tinny'...Did you mean 'tiny'?...
    """


def suggest(name: str, known: Iterable[str], most: int = 3) -> str:
    """` Did you mean 'a' or 'b'?` with the known names nearest to `name`; the empty string where none is near."""
    near = get_close_matches(name, list(known), n=most, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(match) for match in near)}?" if near else ""


def first_line(error: Exception) -> str:
    """What an error of another library says, in one line: its kind and its words; of long ones both ends."""
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    return line if len(line) <= 200 else f"{line[:100]} ... {line[-100:]}"


OF_THE_SYSTEM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM)
"""What the operating system says of a file that cannot be written, however deep a library hides it."""


def cause(error: BaseException) -> str:
    """Why a file could not be read or written, in a few words: `No space left on device`.

    Looks through the errors that led to this one; where none names a reason of the system, `first_line` of this one.
    """
    for each in _chain(error):
        if isinstance(each, OSError) and each.strerror:
            return each.strerror
        for number in OF_THE_SYSTEM:
            if os.strerror(number) in str(each):
                return os.strerror(number)
    return first_line(error) if isinstance(error, Exception) else type(error).__name__


def is_of_the_system(error: BaseException) -> bool:
    """Whether the operating system refused: the disk is full, read-only, over its quota."""
    words = {os.strerror(number) for number in OF_THE_SYSTEM}
    return any(isinstance(each, OSError) for each in _chain(error)) or cause(error) in words


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or following.__context__
