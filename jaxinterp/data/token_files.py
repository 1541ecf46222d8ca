"""Files of token ids, memory-mapped: they may be larger than the memory.

.npy   one axis of integers of any type, or two (a row of ids is a document), as NumPy writes it
.bin   bare integers: uint16 where the tokenizer's ids fit into that, else uint32, unless the user names the type

A .bin file does not say its type: it is refused where its content looks like another one (`integers.py`).
"""

from pathlib import Path

import numpy as np

from jaxinterp.core.errors import UserError, suggest
from jaxinterp.data.integers import bare_integers, integer_type, looks_like, name_of, sample
from jaxinterp.data.text.documents import content_key
from jaxinterp.data.tokens import TextTokenizer, TokenCorpus, corpus_of, ids_below

SUFFIXES = (".bin", ".npy")
SPAN = 1024
"""Tokens of a document in a file without separators."""
CHUNK = 2**22
"""Token ids that are looked at together."""
MAGIC = b"\x93NUMPY"


def read_token_file(
    path: str | Path,
    tokenizer: TextTokenizer | None,
    *,
    max_tokens: int | None = None,
    token_dtype: str | None = None,
) -> TokenCorpus:
    """A file of token ids, memory-mapped: .npy (one integer axis, or rows of ids) or .bin (bare integers).

    Documents are the spans that end in the tokenizer's end token, and in the end of a row; where there is neither,
    spans of 1024 tokens.

    Args:
      tokenizer: whose ids they are; None: any id of at least 0, no end token and no special ones. `fit` and `score`
        compare ids with the model's rows in any case.
      token_dtype: the type of bare integers, such as "uint32"; default: uint16 where the tokenizer's ids fit into that,
        else uint32.
    Raises:
      UserError: no such file, not a file of token ids, bare integers that look like another type, or an id outside the
        vocabulary (with its position).
    """
    stored = _map(Path(path), tokenizer, token_dtype)
    row = stored.shape[1] if stored.ndim == 2 else None
    ids = stored.reshape(-1)[:max_tokens]
    below, end = (2**31, None) if tokenizer is None else (ids_below(tokenizer), tokenizer.end)
    ends = [np.zeros(0, np.int64)]
    for first in range(0, len(ids), CHUNK):
        chunk = np.asarray(ids[first : first + CHUNK])
        outside = np.flatnonzero((chunk < 0) | (chunk >= below))
        if len(outside):
            position = int(outside[0])
            raise UserError(
                f"{path}: token id {chunk[position]} at position {first + position} is not in the vocabulary of "
                f"{below}: was the file written with another tokenizer, or as another integer type (token_dtype=)?"
            )
        ends.append(first + np.flatnonzero(chunk == end) if end is not None else ends[0])
    stops = np.concatenate(ends) + 1
    if row is not None:
        stops = np.union1d(stops, np.arange(row, len(ids) + 1, row))
    separated = len(stops) > 0
    stops = stops if separated else np.arange(SPAN, len(ids), SPAN)
    stops = stops if len(stops) and stops[-1] == len(ids) else np.append(stops, len(ids))
    starts = np.concatenate([[0], stops[:-1]]).astype(np.int64)
    # The key leaves the end token out: a document at the end of the file, without one, is the same document.
    texts = stops - (np.asarray(ids[stops - 1]) == end) if separated and end is not None else stops
    starts, stops, texts = (array[texts > starts] for array in (starts, stops, texts))
    keys = [content_key(ids[start:text].astype("<i4").tobytes()) for start, text in zip(starts, texts, strict=True)]
    return corpus_of(str(path), ids, stops - starts, np.asarray(keys, np.uint64), tokenizer, starts)


def _map(path: Path, tokenizer: TextTokenizer | None, token_dtype: str | None) -> np.ndarray:
    if not path.is_file():
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"no file of token ids {path}.{suggest(path.name, beside)}")
    ids: np.ndarray
    if path.suffix == ".npy" and _has_header(path, token_dtype):
        try:
            ids = np.lib.format.open_memmap(path, mode="r")  # reads no pickle
        except (ValueError, EOFError, OSError) as error:
            raise UserError(f"{path} is not a readable .npy file: {error}") from error
        if token_dtype is not None and integer_type(token_dtype) != ids.dtype:
            raise UserError(f"{path} holds {name_of(ids.dtype)}, not token_dtype={token_dtype!r}: leave that out.")
    elif tokenizer is None and token_dtype is None:
        raise UserError(f"{path} does not say what type its integers have: pass token_dtype=, such as 'uint16'.")
    else:
        below = None if tokenizer is None else ids_below(tokenizer)
        ids = bare_integers(path, stored_as(below or 1), below, token_dtype)
    if ids.ndim not in (1, 2) or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"{path} holds {ids.dtype} with shape {ids.shape}: one axis of integers, or rows, is expected.")
    if not ids.size:
        raise UserError(f"{path} is empty: it holds no token id.")
    return ids


def _has_header(path: Path, token_dtype: str | None) -> bool:
    """Whether NumPy's header begins a file.

    Raises:
      UserError: it does not, and nobody said what type its integers have.
    """
    with path.open("rb") as file:
        header = file.read(len(MAGIC)) == MAGIC
    if not header and token_dtype is None:
        seen = looks_like(sample(path), np.dtype("<u2")) or "uint16"
        raise UserError(
            f"{path} is not a readable .npy file: no header. If it holds bare integers (some libraries give them "
            f"this suffix), name their type: token_dtype={'uint16' if seen == 'text' else seen!r}."
        )
    return header


def stored_as(below: int) -> np.dtype:
    """The integers of a .bin file whose ids are smaller than `below`."""
    return np.dtype("<u2" if below <= 2**16 else "<u4")
