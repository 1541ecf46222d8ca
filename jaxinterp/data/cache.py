"""Token caches: a text that was tokenised once is read from disk, memory-mapped, as long as nothing has changed.

A cache is a folder below the one that the user names. Its own name is a hash of all that the tokens depend on: the
content of the text, the tokenizer, how many tokens were asked for. Another text or tokenizer has another folder.

    ids.bin        token ids, little-endian, uint16 or uint32 as the vocabulary needs: a file of token ids by itself
    lengths.bin    int64: tokens of each document
    keys.bin       uint64: what the split goes by
    corpus.json    number of documents and tokens, and the SHA-256 of each file; written last

Tokens are written as they come, so that a text larger than the memory is tokenised in little of it; reading costs one
pass over the files, which finds every damage. A damaged cache is reported and made again.
"""

import hashlib
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from jaxinterp.core.errors import UserError, cause
from jaxinterp.core.json_value import Json
from jaxinterp.data.text.documents import Document, TokenRow
from jaxinterp.data.token_files import stored_as
from jaxinterp.data.tokens import TextTokenizer, TokenCorpus, corpus_of, encoded, ids_below

VERSION = 2
DESCRIPTION = "corpus.json"
FILES = ("ids.bin", "lengths.bin", "keys.bin")


@runtime_checkable
class Hashed(Protocol):
    """A tokenizer that says what it is by a hash; `jaxinterp.models.files.tokenizer.Tokenizer` does."""

    @property
    def content_hash(self) -> str:
        """The same for tokenizers that give the same ids for every text."""


def through_cache(
    cache: str | Path,
    content: str,
    documents: Iterable[Document | TokenRow],
    tokenizer: TextTokenizer | None,
    *,
    name: str,
    max_tokens: int | None = None,
) -> TokenCorpus:
    """The corpus of these documents: from its cache where that is whole, else tokenised and cached.

    Args:
      cache: the folder of all caches; made where it is absent.
      content: a hash of all that decides which documents come; they are not read where the cache has them.
    Raises:
      UserError: the tokenizer has no `content_hash`, or the folder cannot be written.
    """
    if tokenizer is not None and not isinstance(tokenizer, Hashed):
        raise UserError(f"cache={str(cache)!r}: a {type(tokenizer).__name__} has no content_hash; pass cache=None.")
    parts = [VERSION, content, None if tokenizer is None else tokenizer.content_hash, max_tokens]
    folder = Path(cache) / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
    if folder.exists():
        try:
            return _read(folder, tokenizer, name)
        except (ValueError, OSError, KeyError, TypeError) as damage:
            warnings.warn(f"the token cache {folder} is damaged ({damage}): it is made again.", stacklevel=2)
            shutil.rmtree(folder, ignore_errors=True)
    try:
        _write(folder, documents, tokenizer, max_tokens)
        return _read(folder, tokenizer, name)
    except OSError as error:
        raise UserError(f"cache={str(cache)!r} could not be written: {cause(error)}.") from error


def hash_of_files(files: Sequence[Path], text_field: str) -> str:
    """A hash of what the files hold, in their order, and of the field that is read."""
    digest = hashlib.sha256(text_field.encode())
    for file in files:
        with file.open("rb") as opened:
            digest.update(file.suffix.encode() + hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def hash_of_documents(documents: Iterable[Document | TokenRow]) -> str:
    """A hash of the documents' texts, or ids, in their order."""
    digest = hashlib.sha256()
    for document in documents:
        content = document.ids.tobytes() if isinstance(document, TokenRow) else document.text.encode()
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _write(
    folder: Path, documents: Iterable[Document | TokenRow], tokenizer: TextTokenizer | None, max_tokens: int | None
) -> None:
    """Fill a folder beside its final place and move it there: what is there is whole, whoever else writes it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:12]}")
    unfinished.mkdir()  # not a temporary folder of the library, which others could not read
    try:
        dtype, lengths, keys = _stored_as(tokenizer), [], []
        with (unfinished / "ids.bin").open("wb") as file:
            for key, ids in encoded(documents, tokenizer, max_tokens=max_tokens):
                file.write(ids.astype(dtype).tobytes())
                lengths.append(len(ids))
                keys.append(key)
        np.asarray(lengths, "<i8").tofile(unfinished / "lengths.bin")
        np.asarray(keys, "<u8").tofile(unfinished / "keys.bin")
        description = {
            "version": VERSION,
            "documents": len(keys),
            "tokens": sum(lengths),
            "sha256": {name: _sha256(unfinished / name) for name in FILES},
        }
        (unfinished / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
        try:
            os.rename(unfinished, folder)
        except OSError:
            if not (folder / DESCRIPTION).exists():  # else another process was first, with the same content
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _stored_as(tokenizer: TextTokenizer | None) -> np.dtype:
    return stored_as(2**31 if tokenizer is None else ids_below(tokenizer))


def _read(folder: Path, tokenizer: TextTokenizer | None, name: str) -> TokenCorpus:
    """The corpus in a cache, its ids memory-mapped.

    Raises:
      ValueError, OSError, KeyError, TypeError: a file is missing or not as it was written.
    """
    description: dict[str, Json] = json.loads((folder / DESCRIPTION).read_text())
    for file in FILES:
        if _sha256(folder / file) != description["sha256"][file]:
            raise ValueError(f"{file} is not as it was written")
    lengths, keys = np.fromfile(folder / "lengths.bin", "<i8"), np.fromfile(folder / "keys.bin", "<u8")
    dtype = _stored_as(tokenizer)
    ids = np.memmap(folder / "ids.bin", dtype, mode="r") if len(lengths) else np.zeros(0, dtype)
    if len(keys) != len(lengths) or int(lengths.sum()) != len(ids):
        raise ValueError("its files contradict each other")
    return corpus_of(name, ids, lengths, keys, tokenizer)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
