"""Documents -> token ids, and the split into training and held-out documents.

A `TokenCorpus` is a flat array of token ids and the spans of its documents in it. Taking some of the documents, or
joining corpora, copies no token, so that memory-mapped files may be larger than the memory.

The split goes by the SHA-256 of each document's content (its text; in a file of token ids, the ids): the same document
always falls on the same side, whatever stands around it and however often it occurs.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, overload, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int32, Int64, Integer, UInt64

from jaxinterp.core.errors import UserError
from jaxinterp.data.text.documents import Document, TokenRow

CHUNK = 2**22
"""Characters of text that are encoded together."""


@runtime_checkable
class TextTokenizer(Protocol):
    """What this module asks of a tokenizer; `jaxinterp.models.files.tokenizer.Tokenizer` is one."""

    @property
    def end(self) -> int | None:
        """The token put after every document."""

    @property
    def begin(self) -> int | None:
        """The token that the model expects before every sequence, if there is one."""

    @property
    def special(self) -> frozenset[int]:
        """Ids without text."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of every text, nothing added."""


@runtime_checkable
class WithGaps(Protocol):
    """A tokenizer that says what its largest id is, where not every number below it is an id."""

    @property
    def largest_id(self) -> int:
        """The largest token id."""


def ids_below(tokenizer: TextTokenizer) -> int:
    """The least number above all ids of a tokenizer."""
    return tokenizer.largest_id + 1 if isinstance(tokenizer, WithGaps) else tokenizer.vocab_size


@dataclass(frozen=True, eq=False)
class JoinedIds:
    """Several arrays of token ids one after another, none of them copied. A stretch of it lies within one of them."""

    arrays: tuple[Integer[np.ndarray, " _stored"], ...]

    @property
    def stops(self) -> Int64[np.ndarray, " arrays"]:
        """Where each array ends."""
        return np.cumsum([len(array) for array in self.arrays])

    def __len__(self) -> int:
        return int(self.stops[-1])

    def __getitem__(self, stretch: slice) -> Integer[np.ndarray, " length"]:
        index = int(np.searchsorted(self.stops, stretch.start, side="right"))
        before = 0 if index == 0 else int(self.stops[index - 1])
        return self.arrays[index][stretch.start - before : stretch.stop - before]


@dataclass(frozen=True, eq=False)
class TokenCorpus:
    """Token ids and where the documents lie in them.

    Attributes:
      name: for records and messages.
      ids: flat token ids: int32, or the own integers of a memory-mapped file or of several.
      starts: where in `ids` each document begins.
      lengths: tokens of each document, its end token included; at least 1.
      keys: 64 bits of the SHA-256 of each document's content; what the split goes by.
      special: ids without text: weight 0.
      begin: the token that every window begins with, if the model expects one.
    """

    name: str
    ids: Integer[np.ndarray, " stored"] | JoinedIds
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


def encode_documents(
    documents: Iterable[Document | TokenRow],
    tokenizer: TextTokenizer | None,
    *,
    name: str,
    max_tokens: int | None = None,
) -> TokenCorpus:
    """Documents as token ids, each followed by the tokenizer's end token; documents without a token are left out.

    Rows of ids stay as they are, cut behind every end token; they need no tokenizer.

    Args:
      max_tokens: stop there; the last document may be cut.
    """
    arrays: list[np.ndarray] = []
    keys: list[int] = []
    for key, ids in encoded(documents, tokenizer, max_tokens=max_tokens):
        arrays.append(ids)
        keys.append(key)
    lengths = np.asarray([len(ids) for ids in arrays], np.int64)
    flat = np.concatenate(arrays) if arrays else np.zeros(0, np.int32)
    return corpus_of(name, flat, lengths, np.asarray(keys, np.uint64), tokenizer)


def encoded(
    documents: Iterable[Document | TokenRow], tokenizer: TextTokenizer | None, *, max_tokens: int | None = None
) -> Iterator[tuple[int, Int32[np.ndarray, " length"]]]:
    """The key and the token ids of one document after another, as `encode_documents` gives them.

    Raises:
      UserError: there is text and no tokenizer, or an id that the tokenizer does not have.
    """
    room = max_tokens
    for group in _groups(documents):
        for key, ids in _encoded_group(group, tokenizer):
            array = np.asarray(ids[:room], np.int32)
            yield key, array
            room = None if room is None else room - len(array)
            if room == 0:
                return


def _encoded_group(
    group: Sequence[Document | TokenRow], tokenizer: TextTokenizer | None
) -> Iterator[tuple[int, Sequence[int] | Int32[np.ndarray, " length"]]]:
    texts = [document.text for document in group if isinstance(document, Document)]
    if texts and tokenizer is None:
        raise UserError("the model came without a tokenizer: give its folder a tokenizer.json, or a text of token ids.")
    encodings = iter(tokenizer.encode_batch(texts) if texts and tokenizer is not None else [])
    for document in group:
        if isinstance(document, TokenRow):
            yield from _pieces(document, tokenizer)
        elif ids := next(encodings):
            end = None if tokenizer is None else tokenizer.end
            yield document.key, ids if end is None else [*ids, end]


def _pieces(row: TokenRow, tokenizer: TextTokenizer | None) -> Iterator[tuple[int, Int32[np.ndarray, " length"]]]:
    """A row of ids, cut behind every end token; the key leaves that out, as of a text's end token."""
    if tokenizer is not None and len(row.ids) and row.ids.max() >= ids_below(tokenizer):
        raise UserError(
            f"{row.source}: token id {row.ids.max()} is not in the vocabulary of {ids_below(tokenizer)}: was it "
            "tokenised for another model?"
        )
    end = None if tokenizer is None else tokenizer.end
    stops = np.flatnonzero(row.ids == end) + 1 if end is not None else np.zeros(0, np.int64)
    for piece in np.split(row.ids, stops):
        text = piece[:-1] if len(piece) and piece[-1] == end else piece
        if len(text):
            yield TokenRow(text, row.source).key, piece


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


def corpus_of(
    name: str,
    ids: Integer[np.ndarray, " stored"] | JoinedIds,
    lengths: Integer[np.ndarray, " documents"],
    keys: UInt64[np.ndarray, " documents"],
    tokenizer: TextTokenizer | None,
    starts: Integer[np.ndarray, " documents"] | None = None,
) -> TokenCorpus:
    """A corpus from its parts; without `starts` the documents follow one another without gaps.

    Without a tokenizer there are no special ids and no begin token.
    """
    starts = np.cumsum(lengths) - lengths if starts is None else starts
    if tokenizer is None:
        return TokenCorpus(name, ids, starts, lengths, keys, frozenset(), None)
    special = tokenizer.special | ({tokenizer.end} if tokenizer.end is not None else set())
    return TokenCorpus(name, ids, starts, lengths, keys, frozenset(special), tokenizer.begin)


def _groups(documents: Iterable[Document | TokenRow]) -> Iterator[list[Document | TokenRow]]:
    """Documents in groups of about `CHUNK` characters, to be encoded in parallel."""
    group: list[Document | TokenRow] = []
    characters = 0
    for document in documents:
        group.append(document)
        characters += len(document.ids if isinstance(document, TokenRow) else document.text)
        if characters >= CHUNK:
            yield group
            group, characters = [], 0
    if group:
        yield group
