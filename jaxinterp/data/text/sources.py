"""From the name of a text to its tokens: named corpora, files, folders, and mixtures of them.

    docs                        a named corpus
    docs+kjv                    all documents of several
    docs:0.7+kjv:0.3            seven tokens of the one for three of the other
    books/:2+letters.jsonl:1    the same of paths, which are joined with weights only

A mixture takes as much as its weights allow without taking anything twice: of part k the first share_k * total tokens,
where total = min_k(tokens_k / share_k). The parts' documents stand in the order of how far into their own part they
begin, so that any beginning of the mixture has about its shares.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from jaxinterp.core.errors import UserError, suggest
from jaxinterp.data.cache import hash_of_documents, hash_of_files, through_cache
from jaxinterp.data.text.corpora import NAMED
from jaxinterp.data.text.documents import SUFFIXES, Document, TokenRow, files_of, read_documents, read_rows
from jaxinterp.data.token_files import SUFFIXES as TOKEN_SUFFIXES
from jaxinterp.data.token_files import read_token_file
from jaxinterp.data.tokens import JoinedIds, TextTokenizer, TokenCorpus, encode_documents


def load_corpus(
    source: str,
    tokenizer: TextTokenizer | None,
    *,
    text_field: str = "text",
    max_tokens: int | None = None,
    cache: str | Path | None = None,
    token_dtype: str | None = None,
) -> TokenCorpus:
    """The tokens of a named corpus, of a file or folder, or of several joined by `+`.

    Args:
      source: "docs", "kjv", "shakespeare", "docs+kjv"; a path: .txt, .jsonl, .parquet, .array_record, a folder of
        these, .bin, .npy; or a mixture with weights, "docs:0.7+kjv:0.3". A name goes before a path: a folder called
        docs is "./docs".
      tokenizer: None for files of token ids only.
      text_field: the field of a .jsonl line or the column of a Parquet file that holds the text, or rows of token ids;
        a file without the default field is read from `input_ids`, `token_ids` or `tokens`.
      max_tokens: take no more than these. Of named corpora that is a fair sample of them all, of a path its beginning.
      cache: a folder for token caches. A text that was tokenised before is read from there, memory-mapped; without it
        the tokens are held in memory. Files of token ids are not cached.
      token_dtype: the type of bare integers in a .bin file, such as "uint32"; default: see `read_token_file`.
    Raises:
      UserError: an unknown name, a path that cannot be read, a weight that is none, a corpus whose package is not
        installed.
    """
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"max_tokens={max_tokens} must be at least 1.")
    weights = weighted_parts(source)
    if weights is None:
        return _load(source, tokenizer, text_field, max_tokens, cache, token_dtype)
    shares = [weight / sum(weights.values()) for weight in weights.values()]
    wanted = [None if max_tokens is None else max(1, round(share * max_tokens)) for share in shares]
    parts = [
        _load(part, tokenizer, text_field, most, cache, token_dtype) for part, most in zip(weights, wanted, strict=True)
    ]
    return mixture(parts, shares, name=source)


def weighted_parts(source: str) -> dict[str, float] | None:
    """Part -> weight of a source like `docs:0.7+kjv:0.3`; None where no part has a weight.

    Raises:
      UserError: a weight is not positive, some parts have one and others have none, or a part stands there twice.
    """
    if Path(source).exists():
        return None
    found = [_name_and_weight(part) for part in source.split("+")]
    if all(weight is None for _, weight in found):
        return None
    weights: dict[str, float] = {}
    for part, weight in found:
        if weight is None:
            raise UserError(f"source {source!r}: {part!r} has no weight, but another part has: write {part}:1.")
        if not 0 < weight < math.inf:
            raise UserError(f"source {source!r}: the weight {weight:g} of {part!r} must be positive.")
        if part in weights:
            raise UserError(f"source {source!r}: {part!r} stands there twice; add its weights up.")
        weights[part] = weight
    return weights


def mixture(parts: Sequence[TokenCorpus], shares: Sequence[float], *, name: str) -> TokenCorpus:
    """One corpus of several, with these shares of its tokens (they add to 1); no token is copied or taken twice.

    Args:
      parts: corpora of one tokenizer.
    Raises:
      UserError: a part has too few tokens for its share.
    """
    total = min(part.tokens / share for part, share in zip(parts, shares, strict=True))
    starts, lengths, keys, begins, offset = [], [], [], [], 0
    for part, share in zip(parts, shares, strict=True):
        count = min(part.tokens, round(share * total))
        if not count:
            raise UserError(f"source {name!r}: {part.name!r} gets {count} tokens: give more text, or a larger share.")
        stops = np.cumsum(part.lengths)
        documents = int(np.searchsorted(stops, count)) + 1
        first = (stops - part.lengths)[:documents]
        starts.append(part.starts[:documents] + offset)
        lengths.append(np.minimum(stops[:documents], count) - first)
        keys.append(part.keys[:documents])
        begins.append(first / count)
        offset += len(part.ids)
    order = np.argsort(np.concatenate(begins), kind="stable")
    arrays = [part.ids.arrays if isinstance(part.ids, JoinedIds) else (part.ids,) for part in parts]
    return TokenCorpus(
        name=name,
        ids=JoinedIds(tuple(array for several in arrays for array in several)),
        starts=np.concatenate(starts)[order],
        lengths=np.concatenate(lengths)[order],
        keys=np.concatenate(keys)[order],
        special=parts[0].special,
        begin=parts[0].begin,
    )


@overload
def documents_of(source: str, *, text_field: str = "text") -> Iterable[Document]: ...
@overload
def documents_of(source: str, *, text_field: str = "text", rows: bool) -> Iterable[Document | TokenRow]: ...
def documents_of(
    source: str, *, text_field: str = "text", rows: bool = False
) -> Iterable[Document] | Iterable[Document | TokenRow]:
    """The documents of a named corpus, of several joined by `+`, or of a file or folder of text.

    Of named corpora each text is there once, in an order that makes any beginning a fair sample.

    Args:
      rows: whether rows of token ids may be among them.
    Raises:
      UserError: an unknown name or a path that cannot be read.
    """
    parts = list(dict.fromkeys(source.split("+")))
    if _named(source):
        return _mixed(document for part in parts for document in NAMED[part]())
    unknown = [part for part in parts if part not in NAMED]
    if not source or not Path(source).exists():
        if len(parts) > 1 and all(Path(part).exists() for part in unknown):
            raise UserError(f"source {source!r}: give every part a weight: {'+'.join(f'{part}:1' for part in parts)}.")
        if not Path(source).suffix:
            raise UserError(
                f"no corpus and no path {unknown[0]!r}: give {', '.join(NAMED)} (joined by +), or a file or folder of "
                f"{', '.join(SUFFIXES + TOKEN_SUFFIXES)}.{suggest(unknown[0], NAMED)}"
            )
    return (read_rows if rows else read_documents)(source, text_field=text_field)


def _load(
    source: str,
    tokenizer: TextTokenizer | None,
    text_field: str,
    max_tokens: int | None,
    cache: str | Path | None,
    token_dtype: str | None,
) -> TokenCorpus:
    """One source without weights."""
    if Path(source).suffix in TOKEN_SUFFIXES and not _named(source):
        return read_token_file(source, tokenizer, max_tokens=max_tokens, token_dtype=token_dtype)
    documents: Iterable[Document | TokenRow] = documents_of(source, text_field=text_field, rows=True)
    if cache is None:
        return encode_documents(documents, tokenizer, name=source, max_tokens=max_tokens)
    if _named(source):
        documents = list(documents)
        content = hash_of_documents(documents)
    else:
        content = hash_of_files(files_of(source), text_field)
    return through_cache(cache, content, documents, tokenizer, name=source, max_tokens=max_tokens)


def _named(source: str) -> bool:
    return all(part in NAMED for part in source.split("+"))


def _name_and_weight(part: str) -> tuple[str, float | None]:
    """`kjv:0.3` -> ("kjv", 0.3); what does not end in a number, or is a path as it stands, has no weight."""
    name, _, tail = part.rpartition(":")
    try:
        return (part, None) if not name or Path(part).exists() else (name, float(tail))
    except ValueError:
        return part, None


def _mixed(documents: Iterable[Document]) -> list[Document]:
    """Each text once, ordered by its SHA-256, so that any beginning is a fair sample.

    The split looks at the last 8 bytes of the same hash, the order at the first ones: they know nothing of each other.
    """
    by_hash = {hashlib.sha256(document.text.encode()).digest(): document for document in documents}
    return [by_hash[digest] for digest in sorted(by_hash)]
