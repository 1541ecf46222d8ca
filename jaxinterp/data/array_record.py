"""Text from Array Record files, one document per record.

Array Record is Grain's own file format: records of bytes, compressed in groups, each group with a checksum. It says
nothing of what the bytes are, so the first record of a file decides for all of them: where it is a JSON object, every
record is one, and the text is in a field of it; else every record is UTF-8 text.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxinterp.errors import UserError

SUFFIXES = (".array_record", ".arrayrecord")
RECORDS = 64
"""Records that are read together."""


def texts_of_array_record(path: Path, text_field: str) -> Iterator[tuple[str, str]]:
    """(text, place) of every record; the place is `path:number`, from 1.

    Raises:
      UserError: array_record is not installed; no Array Record file, or a damaged one; a record that is no UTF-8, or no
        object with such a field.
    """
    reader = _open(path)
    try:
        count = reader.num_records()
        objects: bool | None = None
        for start in range(0, count, RECORDS):
            for number, record in enumerate(_read(reader, path, start, min(start + RECORDS, count)), start + 1):
                where = f"{path}, record {number}"
                try:
                    text = record.decode()
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{where}: byte {error.start + 1} is not UTF-8: records must be text, or JSON objects."
                    ) from error
                if objects is None:
                    objects = _object(text) is not None
                yield (_field(text, text_field, where) if objects else text), f"{path}:{number}"
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
        raise UserError(f"{path} is no whole Array Record file: it is damaged, truncated, or was not closed.")
    return reader


def _read(reader: Any, path: Path, start: int, stop: int) -> list[bytes]:
    try:
        records: list[bytes] = reader.read(start, stop)
    except (RuntimeError, ValueError, IndexError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{path}: records {start + 1} to {stop} are damaged ({first}).") from error
    return records


def _object(text: str) -> dict[str, Any] | None:
    """The JSON object that a text is, if it is one."""
    try:
        value = json.loads(text) if text.lstrip().startswith("{") else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _field(text: str, text_field: str, where: str) -> str:
    record = _object(text)
    if record is None:
        raise UserError(f"{where}: no JSON object, which the file's first record is.")
    if text_field not in record:
        fields = ", ".join(map(repr, list(record)[:8])) or "none"
        raise UserError(f"{where}: no field text_field={text_field!r}; its fields: {fields}.")
    if not isinstance(record[text_field], str):
        kind = type(record[text_field]).__name__
        raise UserError(f"{where}: field {text_field!r} holds {kind}, where text is expected.")
    return str(record[text_field])
