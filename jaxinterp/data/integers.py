"""What type bare integers have: a file of token ids without a header does not say, so its content is looked at.

    uint32 and int64 ids read as uint16      a zero after every id (three after every id)
    big-endian integers                      the zeros come first
    text                                     every byte is a printable character

A file is never read against what it looks like; who knows better names the type (`token_dtype`).
"""

from pathlib import Path

import numpy as np
from jaxtyping import UInt8, UInt16

from jaxinterp.core.errors import UserError

SAMPLE = 2**20
"""Bytes at the beginning and at the end that are looked at."""
FEWEST = 8
"""Ids that a pattern must repeat over: fewer may be a coincidence."""
SMALL = 15
"""The upper half of an id below 2**20, which is more than any vocabulary, is at most this."""
OTHERS = {"<u2": ">u2", "<u4": "<u2"}
"""By assumed type: what ids may have where most of them are outside the vocabulary."""


def integer_type(name: str) -> np.dtype:
    """The type that a user names: `uint16`, `int32`, `>u4`.

    Raises:
      UserError: it is not an integer type.
    """
    try:
        dtype = np.dtype(name)
    except (TypeError, ValueError) as error:
        raise UserError(f"token_dtype={name!r} is not a type of NumPy; give uint16, uint32, int32 or int64.") from error
    if not np.issubdtype(dtype, np.integer):
        raise UserError(f"token_dtype={name!r} is not an integer type; give uint16, uint32, int32 or int64.")
    return dtype.newbyteorder("<") if dtype.byteorder in "=|" and dtype.itemsize > 1 else dtype


def bare_integers(path: Path, assumed: np.dtype, below: int | None, token_dtype: str | None) -> np.ndarray:
    """The integers in a file without a header, memory-mapped.

    Args:
      assumed: the type where the user names none.
      below: token ids are smaller than this; None: not known.
      token_dtype: the type that the user names.
    Raises:
      UserError: the content looks like another type than `assumed`, or its size is not a multiple of the type's.
    """
    size = path.stat().st_size
    dtype = assumed if token_dtype is None else integer_type(token_dtype)
    seen = None if token_dtype is not None else looks_like(sample(path), assumed, below)
    if seen is not None:
        raise UserError(
            f"{path} does not say what type its integers have, and does not look like {name_of(assumed)}, but like "
            f"{seen}: {_way_out(seen)}, or token_dtype={name_of(assumed)!r} if it is right after all."
        )
    if size % dtype.itemsize:
        raise UserError(
            f"{path} has {size} bytes, which is not a whole number of {name_of(dtype)} token ids: name the type that "
            "it has, such as token_dtype='uint8'."
        )
    return np.memmap(path, dtype, mode="r") if size else np.zeros(0, dtype)


def sample(path: Path) -> UInt8[np.ndarray, " bytes"]:
    """The first and the last bytes of a file; of large files, whole 8-byte words."""
    size = path.stat().st_size
    if size <= 2 * SAMPLE:
        return np.fromfile(path, np.uint8)
    last = (size - SAMPLE) // 8 * 8
    parts = [np.fromfile(path, np.uint8, SAMPLE, offset=offset) for offset in (0, last)]
    return np.concatenate(parts)


def looks_like(raw: UInt8[np.ndarray, " bytes"], assumed: np.dtype, below: int | None = None) -> str | None:
    """The type that bare integers look like, where it is not the assumed one; "text" for a text; None: no objection."""
    if len(raw) >= 4 * FEWEST and _is_text(raw):
        return "text"
    found = _by_halves(raw)
    if found is not None and np.dtype(found) != assumed:
        return found
    other = np.dtype(OTHERS.get(assumed.str, assumed))
    if below is not None and _inside(raw, assumed, below) < 0.5 and _inside(raw, other, below) == 1:
        return name_of(other)
    return None


def name_of(dtype: np.dtype) -> str:
    """`uint16`, `>u4`: as a user would name it."""
    return dtype.str if dtype.byteorder == ">" else dtype.name


def _way_out(seen: str) -> str:
    return "give it the suffix .txt" if seen == "text" else f"pass token_dtype={seen!r}"


def _is_text(raw: UInt8[np.ndarray, " bytes"]) -> bool:
    return bool(np.all(((raw >= 32) & (raw < 127)) | ((raw >= 9) & (raw <= 13))))


def _by_halves(raw: UInt8[np.ndarray, " bytes"]) -> str | None:
    """The type of wide integers, by halves that hold nothing."""
    for width, names in ((8, ("int64", ">i8")), (4, ("uint32", ">u4"))):
        if len(raw) % width or len(raw) < width * FEWEST:
            continue
        halves = raw.view("<u2").reshape(-1, width // 2)
        little, big = (halves[:, 0], halves[:, 1:]), (halves[:, -1].byteswap(), halves[:, :-1].byteswap())
        for name, (low, high) in zip(names, (little, big), strict=True):
            if _is_upper(high, low):
                return name
    return None


def _is_upper(high: UInt16[np.ndarray, "ids rest"], low: UInt16[np.ndarray, " ids"]) -> bool:
    """Whether `high` holds the upper halves of integers that are smaller than 2**20, and `low` the lower ones."""
    if not high.any():
        return bool(low.any())
    small = np.mean((high <= SMALL) | (high == 0xFFFF))
    return bool(small > 0.99 and np.mean(low <= SMALL) < 0.5)


def _inside(raw: UInt8[np.ndarray, " bytes"], dtype: np.dtype, below: int) -> float:
    """The share of ids in the vocabulary; of too few ids, all of them."""
    ids = raw[: len(raw) // dtype.itemsize * dtype.itemsize].view(dtype)
    return 1.0 if len(ids) < FEWEST else float(np.mean(ids < below))
