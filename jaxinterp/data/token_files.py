"""Files of token ids, memory-mapped: they may be larger than the memory.

.npy   one axis of integers of any type, as NumPy writes it
.bin   bare little-endian integers: uint16 where the tokenizer's ids fit into that, else uint32
"""

from pathlib import Path

import numpy as np

from jaxinterp.core.errors import UserError, suggest
from jaxinterp.data.text.documents import content_key
from jaxinterp.data.tokens import TextTokenizer, TokenCorpus, corpus_of

SUFFIXES = (".bin", ".npy")
SPAN = 1024
"""Tokens of a document in a file without separators."""
CHUNK = 2**22
"""Token ids that are looked at together."""


def read_token_file(path: str | Path, tokenizer: TextTokenizer, *, max_tokens: int | None = None) -> TokenCorpus:
    """A file of token ids, memory-mapped: .npy (one integer axis) or .bin (bare little-endian integers).

    A .bin file holds uint16 where the tokenizer's ids fit into that, else uint32. Documents are the spans that end in
    the tokenizer's end token; where none occurs, spans of 1024 tokens.

    Raises:
      UserError: no such file, not a file of token ids, or an id outside the vocabulary (with its position).
    """
    ids = _map(Path(path), tokenizer.vocab_size)[:max_tokens]
    ends = [np.zeros(0, np.int64)]
    for first in range(0, len(ids), CHUNK):
        chunk = np.asarray(ids[first : first + CHUNK])
        outside = np.flatnonzero((chunk < 0) | (chunk >= tokenizer.vocab_size))
        if len(outside):
            position = int(outside[0])
            raise UserError(
                f"{path}: token id {chunk[position]} at position {first + position} is not in the vocabulary of "
                f"{tokenizer.vocab_size}: was the file written with another tokenizer, or as another integer type?"
            )
        ends.append(first + np.flatnonzero(chunk == tokenizer.end) if tokenizer.end is not None else ends[0])
    separated = any(len(positions) for positions in ends)
    stops = np.concatenate(ends) + 1 if separated else np.arange(SPAN, len(ids), SPAN)
    stops = stops if len(stops) and stops[-1] == len(ids) else np.append(stops, len(ids))
    starts = np.concatenate([[0], stops[:-1]]).astype(np.int64)
    # The key leaves the end token out: a document at the end of the file, without one, is the same document.
    texts = stops - (np.asarray(ids[stops - 1]) == tokenizer.end) if separated else stops
    starts, stops, texts = (array[texts > starts] for array in (starts, stops, texts))
    keys = [content_key(ids[start:text].astype("<i4").tobytes()) for start, text in zip(starts, texts, strict=True)]
    return corpus_of(str(path), ids, stops - starts, np.asarray(keys, np.uint64), tokenizer, starts)


def _map(path: Path, vocab_size: int) -> np.ndarray:
    if not path.is_file():
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"no file of token ids {path}.{suggest(path.name, beside)}")
    if path.suffix == ".npy":
        try:
            ids: np.ndarray = np.lib.format.open_memmap(path, mode="r")  # reads no pickle
        except (ValueError, EOFError, OSError) as error:
            raise UserError(f"{path} is no readable .npy file: {error}") from error
    else:
        dtype = stored_as(vocab_size)
        size = path.stat().st_size
        if size % dtype.itemsize:
            raise UserError(f"{path} has {size} bytes, which is no whole number of {dtype.name} token ids.")
        ids = np.memmap(path, dtype, mode="r") if size else np.zeros(0, dtype)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"{path} holds {ids.dtype} with shape {ids.shape}: one axis of integers is expected.")
    if not len(ids):
        raise UserError(f"{path} is empty: it holds no token id.")
    return ids


def stored_as(vocab_size: int) -> np.dtype:
    """The integers of a .bin file."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
