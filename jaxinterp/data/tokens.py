"""Documents -> token ids, and the split into training and held-out documents.

A `TokenCorpus` is a flat array of token ids and the spans of its documents in it. Taking some of the documents copies
no token, so that a memory-mapped file may be larger than the memory.

The split goes by the SHA-256 of each document's content (its text; in a file of token ids, the ids): the same document
always falls on the same side, whatever stands around it and however often it occurs.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, overload, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int32, Integer, UInt64

from jaxinterp.data.corpora import NAMED
from jaxinterp.data.documents import SUFFIXES, Document, content_key, read_documents
from jaxinterp.errors import UserError, suggest

TOKEN_SUFFIXES = (".bin", ".npy")
SPAN = 1024
"""Tokens of a document in a file of token ids without separators."""
CHUNK = 2**22
"""Token ids of a memory-mapped file, or characters of text, that are looked at together."""


@runtime_checkable
class TextTokenizer(Protocol):
    """What this module asks of a tokenizer; `jaxinterp.models.tokenizer.Tokenizer` is one."""

    @property
    def end(self) -> int | None:
        """The token put after every document."""

    @property
    def begin(self) -> int | None:
        """The token that the model expects before every sequence, if there is one."""

    @property
    def special(self) -> frozenset[int]:
        """Ids that stand for no text."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of every text, nothing added."""


@dataclass(frozen=True, eq=False)
class TokenCorpus:
    """Token ids and where the documents lie in them.

    Attributes:
      name: for records and messages.
      ids: flat token ids: int32, or a memory-mapped file's own integers.
      starts: where in `ids` each document begins.
      lengths: tokens of each document, its end token included; at least 1.
      keys: 64 bits of the SHA-256 of each document's content; what the split goes by.
      special: ids that stand for no text: weight 0.
      begin: the token that every window begins with, if the model expects one.
    """

    name: str
    ids: Integer[np.ndarray, " stored"]
    starts: Integer[np.ndarray, " documents"]
    lengths: Integer[np.ndarray, " documents"]
    keys: UInt64[np.ndarray, " documents"]
    special: frozenset[int]
    begin: int | None

    @property
    def tokens(self) -> int:
        """Number of tokens in all documents."""
        return int(self.lengths.sum())

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.starts)

    @property
    def content_hash(self) -> str:
        """SHA-256 over the keys and lengths of the documents in their order: for the record of a run."""
        content = self.keys.astype("<u8").tobytes() + self.lengths.astype("<i8").tobytes()
        return hashlib.sha256(content).hexdigest()

    def document(self, index: int, start: int = 0, stop: int | None = None) -> Int32[np.ndarray, " length"]:
        """The token ids of one document, or those from `start` to before `stop` in it."""
        first, length = int(self.starts[index]), int(self.lengths[index])
        stop = length if stop is None else stop
        return np.asarray(self.ids[first + start : first + stop], np.int32)

    def select(self, chosen: Bool[np.ndarray, " documents"]) -> "TokenCorpus":
        """The chosen documents, in the same order; the tokens are shared, not copied."""
        return replace(self, starts=self.starts[chosen], lengths=self.lengths[chosen], keys=self.keys[chosen])


def load_corpus(
    source: str, tokenizer: TextTokenizer, *, text_field: str = "text", max_tokens: int | None = None
) -> TokenCorpus:
    """The tokens of a named corpus, of several joined by `+`, or of a file or folder.

    Args:
      source: "docs", "kjv", "shakespeare", "docs+kjv"; or a path: .txt, .jsonl, a folder of these, .bin, .npy. A name
        goes before a path: a folder called docs is "./docs".
      text_field: the field of a .jsonl line that holds the text.
      max_tokens: take no more than these. Of named corpora that is a fair sample of them all, of a path its beginning.
    Raises:
      UserError: an unknown name, a path that cannot be read, a corpus whose package is not installed.
    """
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"max_tokens={max_tokens} must be at least 1.")
    parts = source.split("+")
    if all(part in NAMED for part in parts):
        documents: Iterable[Document] = _mixed(document for part in dict.fromkeys(parts) for document in NAMED[part]())
    elif not source or not (Path(source).exists() or Path(source).suffix):
        unknown = next(part for part in parts if part not in NAMED)
        raise UserError(
            f"no corpus and no path {unknown!r}: give {', '.join(NAMED)} (joined by +), or a file or folder of "
            f"{', '.join(SUFFIXES + TOKEN_SUFFIXES)}.{suggest(unknown, NAMED)}"
        )
    elif Path(source).suffix in TOKEN_SUFFIXES:
        return read_token_file(source, tokenizer, max_tokens=max_tokens)
    else:
        documents = read_documents(source, text_field=text_field)
    return encode_documents(documents, tokenizer, name=source, max_tokens=max_tokens)


def encode_documents(
    documents: Iterable[Document], tokenizer: TextTokenizer, *, name: str, max_tokens: int | None = None
) -> TokenCorpus:
    """Documents as token ids, each followed by the tokenizer's end token; documents without a token are left out.

    Args:
      max_tokens: stop there; the last document may be cut.
    """
    arrays: list[np.ndarray] = []
    keys: list[int] = []
    room = max_tokens
    for group in _groups(documents):
        for document, ids in zip(group, tokenizer.encode_batch([document.text for document in group]), strict=True):
            if not ids:
                continue
            if tokenizer.end is not None:
                ids = [*ids, tokenizer.end]
            arrays.append(np.asarray(ids[:room], np.int32))
            keys.append(document.key)
            room = None if room is None else room - len(arrays[-1])
            if room == 0:
                break
        if room == 0:
            break
    lengths = np.asarray([len(ids) for ids in arrays], np.int64)
    flat = np.concatenate(arrays) if arrays else np.zeros(0, np.int32)
    return _corpus(name, flat, np.cumsum(lengths) - lengths, lengths, keys, tokenizer)


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
    return _corpus(str(path), ids, starts, stops - starts, keys, tokenizer)


@overload
def split(corpus: TokenCorpus, heldout_fraction: float) -> tuple[TokenCorpus, TokenCorpus]: ...
@overload
def split(corpus: Sequence[Document], heldout_fraction: float) -> tuple[list[Document], list[Document]]: ...
def split(corpus: TokenCorpus | Sequence[Document], heldout_fraction: float) -> tuple:
    """Training and held-out documents, by content: held out is what has key < heldout_fraction * 2**64.

    A document keeps its side when others come or go, its copies share it, and a larger fraction holds out more besides.

    Raises:
      UserError: the fraction does not lie between 0 and 1, or one side would have no document.
    """
    if not 0 < heldout_fraction < 1:
        raise UserError(f"heldout_fraction={heldout_fraction} must lie between 0 and 1.")
    if isinstance(corpus, TokenCorpus):
        keys = corpus.keys
    else:
        keys = np.asarray([document.key for document in corpus], np.uint64)
    heldout = keys < np.uint64(int(heldout_fraction * 2**64))
    if heldout.all() or not heldout.any():
        side = "training" if heldout.any() else "held-out"
        raise UserError(
            f"heldout_fraction={heldout_fraction} leaves no {side} document among {len(keys)}: "
            "give more documents or another fraction."
        )
    if isinstance(corpus, TokenCorpus):
        return corpus.select(~heldout), corpus.select(heldout)
    sides: tuple[list[Document], list[Document]] = ([], [])
    for document, out in zip(corpus, heldout, strict=True):
        sides[int(out)].append(document)
    return sides


def _corpus(
    name: str, ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray, keys: list[int], tokenizer: TextTokenizer
) -> TokenCorpus:
    special = tokenizer.special | ({tokenizer.end} if tokenizer.end is not None else set())
    return TokenCorpus(name, ids, starts, lengths, np.asarray(keys, np.uint64), special, tokenizer.begin)


def _mixed(documents: Iterable[Document]) -> list[Document]:
    """Each text once, ordered by its SHA-256, so that any beginning is a fair sample.

    The split looks at the last 8 bytes of the same hash, the order at the first ones: they know nothing of each other.
    """
    by_hash = {hashlib.sha256(document.text.encode()).digest(): document for document in documents}
    return [by_hash[digest] for digest in sorted(by_hash)]


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in groups of about `CHUNK` characters, to be encoded in parallel."""
    group: list[Document] = []
    characters = 0
    for document in documents:
        group.append(document)
        characters += len(document.text)
        if characters >= CHUNK:
            yield group
            group, characters = [], 0
    if group:
        yield group


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
        dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        size = path.stat().st_size
        if size % dtype.itemsize:
            raise UserError(f"{path} has {size} bytes, which is no whole number of {dtype.name} token ids.")
        ids = np.memmap(path, dtype, mode="r") if size else np.zeros(0, dtype)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"{path} holds {ids.dtype} with shape {ids.shape}: one axis of integers is expected.")
    if not len(ids):
        raise UserError(f"{path} is empty: it holds no token id.")
    return ids
