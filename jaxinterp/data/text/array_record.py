"""Text from Array Record files, one document per record.

Array Record is Grain's own file format: records of bytes, compressed in groups, each group with a checksum. It says
nothing of what the bytes are, so the first record of a file decides for all of them:

    tf.train.Example     what TensorFlow Datasets write: the text is the feature named like the field
    a JSON object        the text is in that field
    else                 the record is the text, in UTF-8
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxinterp.core.errors import UserError
from jaxinterp.core.json_value import Json
from jaxinterp.data.text.example_record import example_features
from jaxinterp.data.text.json_record import content_of_object

SUFFIXES = (".array_record", ".arrayrecord")
SHARD = re.compile(r"(\.array_?record)-\d+-of-\d+")
"""How TensorFlow Datasets end the names of a text's files: `wiki-train.array_record-00000-of-00002`."""
RECORDS = 64
"""Records that are read together."""
Content = str | np.ndarray
"""A text, or a row of token ids."""
TextOf = Callable[[bytes, str, str], Content | None]
"""(record, text field, place for messages) -> what it holds; None: nothing."""


def texts_of_array_record(path: Path, text_field: str) -> Iterator[tuple[Content, str]]:
    """(text, place) of every record; the place is `path:number`, from 1. JSON objects may hold rows of token ids.

    Records whose text is null are passed over.

    Raises:
      UserError: array_record is not installed; no Array Record file, or a damaged one; a record that is not UTF-8, no
        object with such a field.
    """
    reader = _open(path)
    try:
        count = reader.num_records()
        text_of: TextOf | None = None
        for start in range(0, count, RECORDS):
            for number, record in enumerate(_read(reader, path, start, min(start + RECORDS, count)), start + 1):
                text_of = text_of or _kind(record)
                content = text_of(record, text_field, f"{path}, record {number}")
                if content is not None:
                    yield content, f"{path}:{number}"
    finally:
        reader.close()


def _open(path: Path) -> Any:
    try:
        from array_record.python import array_record_module
    except ImportError as error:
        raise UserError(f"{path}: reading Array Record needs: python -m pip install array-record.") from error
    try:
        # Without read-ahead: 16 MiB for each of as many threads as there are cores would be held otherwise.
        reader = array_record_module.ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")
        whole = reader.ok()
    except (RuntimeError, ValueError):  # such as a file below the smallest size
        whole = False
    if not whole:
        raise UserError(f"{path} is not a whole Array Record file: it is damaged, truncated, or was not closed.")
    return reader


def _read(reader: Any, path: Path, start: int, stop: int) -> list[bytes]:
    try:
        records: list[bytes] = reader.read(start, stop)
    except (RuntimeError, ValueError, IndexError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{path}: records {start + 1} to {stop} are damaged ({first}).") from error
    return records


def _kind(record: bytes) -> TextOf:
    """How records like this one are read."""
    if example_features(record) is not None:
        return _of_example
    return _plain if _object(record) is None else _of_json


def _plain(record: bytes, text_field: str, where: str) -> str:
    try:
        return record.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start + 1} is not UTF-8, which text must be.") from error


def _of_example(record: bytes, text_field: str, where: str) -> str:
    features = example_features(record)
    if features is None:
        raise UserError(f"{where}: no tf.train.Example, which the file's first record is.")
    if text_field not in features:
        names = ", ".join(map(repr, list(features)[:8])) or "none"
        raise UserError(f"{where}: no field text_field={text_field!r}; its fields: {names}.")
    values = features[text_field]
    if values is None or len(values) != 1:
        kind = "numbers" if values is None else f"{len(values)} values"
        raise UserError(f"{where}: feature {text_field!r} holds {kind}, where one text is expected.")
    return _plain(values[0], text_field, where)


def _of_json(record: bytes, text_field: str, where: str) -> Content | None:
    fields = _object(record)
    if fields is None:
        raise UserError(f"{where}: no JSON object, which the file's first record is.")
    return content_of_object(fields, text_field, where)


def _object(record: bytes) -> dict[str, Json] | None:
    """The JSON object that a record is, if it is one."""
    try:
        value = json.loads(record) if record.lstrip().startswith(b"{") else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
