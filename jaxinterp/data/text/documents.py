"""Text -> documents, as a stream: a .txt, .jsonl, .parquet or .array_record file, or a folder of these.

A document is what the split into training and held-out text never divides, so a long text file is cut into pieces:
at a line that says `<|endoftext|>`, and otherwise at the first blank line after `PIECE` characters.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from jaxinterp.core.errors import UserError, suggest
from jaxinterp.data.text.array_record import SHARD, texts_of_array_record
from jaxinterp.data.text.array_record import SUFFIXES as ARRAY_RECORD
from jaxinterp.data.text.json_record import content_of_object
from jaxinterp.data.text.parquet import SUFFIX as PARQUET
from jaxinterp.data.text.parquet import texts_of_parquet

PIECE = 8_000
"""Characters after which a text file is cut at the next blank line (about 2,000 tokens of English)."""
LONGEST_LINE = 64 * 2**20
"""Bytes of a line that are read at most: a file without line ends must not fill the memory."""
SEPARATOR_LINE = "<|endoftext|>"


@dataclass(frozen=True)
class Document:
    """A text, and where it stands: a path (with the line of its start), for messages and reports."""

    text: str
    source: str

    @property
    def key(self) -> int:
        """A number below 2**64 that depends on the text alone."""
        return content_key(self.text.encode())


@dataclass(frozen=True, eq=False)
class TokenRow:
    """A document that is token ids already, and where it stands."""

    ids: Int32[np.ndarray, " length"]
    source: str

    @property
    def key(self) -> int:
        """A number below 2**64 that depends on the ids alone."""
        return content_key(self.ids.astype("<i4").tobytes())


def content_key(content: bytes) -> int:
    """The last 8 bytes of the SHA-256 of `content`: the same content has the same key, wherever it stands."""
    return int.from_bytes(hashlib.sha256(content).digest()[-8:], "big")


def read_documents(path: str | Path, *, text_field: str = "text") -> Iterator[Document]:
    """The texts of a file, or of all files below a folder, by name: `read_rows`, where rows of ids are refused.

    Raises:
      UserError: as `read_rows`; or a row is token ids.
    """
    return _texts(read_rows(path, text_field=text_field))


def _texts(rows: Iterable["Document | TokenRow"]) -> Iterator[Document]:
    for row in rows:
        if isinstance(row, TokenRow):
            raise UserError(f"{row.source}: it holds token ids, where text is expected: pass text_field=.")
        yield row


def read_rows(path: str | Path, *, text_field: str = "text") -> Iterator[Document | TokenRow]:
    """The documents of a file, or of all files below a folder, by name.

    A .jsonl file has one per line, .parquet one per row, .array_record one per record; a .txt file is cut. Texts that
    are null or hold only white space are passed over. Rows of token ids (`input_ids`) are read as they are.

    Args:
      text_field: the field of a .jsonl line or JSON record, or the column of a Parquet file, that holds the text.
    Raises:
      UserError: at once if there is no such file, its kind is unknown or the folder holds none; while reading if
        a line, row or record is malformed (the message names file and place), or at the end if there was no text at
        all.
    """
    files = files_of(path)
    documents = (document for file in files for document in READERS[kind_of(file)](file, text_field))
    return _some(Path(path), (document for document in documents if _has_content(document)))


def _has_content(document: "Document | TokenRow") -> bool:
    return len(document.ids) > 0 if isinstance(document, TokenRow) else bool(document.text.strip())


def _row(content: str | Int32[np.ndarray, " length"], place: str) -> "Document | TokenRow":
    return Document(content, place) if isinstance(content, str) else TokenRow(content, place)


def files_of(path: str | Path) -> list[Path]:
    """The file itself, or the files of text below a folder, in the order in which they are read.

    What is hidden (`.ipynb_checkpoints/`, `._notes.jsonl`) is passed over.

    Raises:
      UserError: there is none, or it is of another kind.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(
            file
            for file in path.rglob("*")
            if kind_of(file) in SUFFIXES and file.is_file() and not _hidden(file.relative_to(path))
        )
        if not files:
            raise UserError(f"the folder {path} holds no {' or '.join(SUFFIXES)} file.")
        return files
    if not path.exists():
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"no text file or folder {path}.{suggest(path.name, beside)}")
    if kind_of(path) not in SUFFIXES:
        raise UserError(
            f"{path}: cannot read text from {path.suffix or 'a file without suffix'}: "
            f"give {' or '.join(SUFFIXES)}, or a folder of them."
        )
    return [path]


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def kind_of(path: Path) -> str:
    """The suffix that says what a file is; of one of several numbered files, what stands before its number."""
    shard = SHARD.fullmatch(path.suffix)
    return path.suffix if shard is None else shard[1]


def cut(lines: Iterable[tuple[int, str]], source: str) -> Iterator[Document]:
    """Documents of about `PIECE` characters from numbered lines, cut at blank lines and at separator lines."""
    piece: list[str] = []
    start, length = 1, 0
    for number, line in lines:
        separator = line.strip() == SEPARATOR_LINE
        if piece and (separator or (length >= PIECE and not line.strip()) or length >= 2 * PIECE):
            yield Document("".join(piece).strip(), f"{source}:{start}")
            piece, length = [], 0
        if not separator and (piece or line.strip()):
            start = start if piece else number
            piece.append(line)
            length += len(line)
    if piece:
        yield Document("".join(piece).strip(), f"{source}:{start}")


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their numbers from 1; a byte order mark and `\\r` are dropped.

    Raises:
      UserError: a line that is not UTF-8 or longer than `LONGEST_LINE`, by file and line.
    """
    number = 0
    try:
        with path.open("rb") as file:
            while raw := file.readline(LONGEST_LINE + 1):
                number += 1
                if len(raw) > LONGEST_LINE:
                    raise UserError(f"{path}, line {number}: longer than {LONGEST_LINE} bytes; break it into lines.")
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, line.replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {number}: byte {error.start + 1} is not UTF-8; convert the file.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error


def _of_text(path: Path, text_field: str) -> Iterator[Document]:
    return cut(numbered_lines(path), str(path))


def _of_parquet(path: Path, text_field: str) -> Iterator[Document | TokenRow]:
    return (_row(content, place) for content, place in texts_of_parquet(path, text_field))


def _of_array_record(path: Path, text_field: str) -> Iterator[Document | TokenRow]:
    return (_row(content, place) for content, place in texts_of_array_record(path, text_field))


def _of_jsonl(path: Path, text_field: str) -> Iterator[Document | TokenRow]:
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not readable JSON ({error}).") from error
        if not isinstance(record, dict):
            raise UserError(f"{where}: a JSON object is expected, not {type(record).__name__}.")
        content = content_of_object(record, text_field, where)
        if content is not None:
            yield _row(content, f"{path}:{number}")


def _some(path: Path, documents: Iterable[Document | TokenRow]) -> Iterator[Document | TokenRow]:
    empty = True
    for document in documents:
        empty = False
        yield document
    if empty:
        raise UserError(f"{path} is empty: it holds no text.")


READERS: Mapping[str, Callable[[Path, str], Iterator[Document | TokenRow]]] = {
    ".txt": _of_text,
    ".jsonl": _of_jsonl,
    PARQUET: _of_parquet,
    **dict.fromkeys(ARRAY_RECORD, _of_array_record),
}
"""By suffix: (file, text field) -> its documents."""
SUFFIXES = tuple(READERS)
