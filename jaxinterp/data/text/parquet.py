"""Text from Parquet files, one document per row of a text column, read in batches of rows.

The reader is pyarrow, an extra of this package (`jaxinterp[parquet]`): it is imported when the first file is read. Only
the text column is read. What a file says of its sizes is looked at before anything is read, and its pages are compared
with their checksums where it has any.

A column may say a long text once and name it in any number of rows, so that a file of bytes stands for gigabytes. It is
read as it is written, as a table of texts and numbers of rows in it, and one row after another is made a text.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from jaxinterp.core.errors import UserError, suggest
from jaxinterp.data.text.id_rows import MASK, field_of, ids_of_row

SUFFIX = ".parquet"
ROWS = 256
"""Rows that are decoded together."""
LARGEST_GROUP = 8 * 2**30
"""Bytes of a row group's text column, uncompressed: a reader may have to hold it."""
LONGEST_TEXT = 64 * 2**20
"""Bytes of one row's text."""


def texts_of_parquet(path: Path, text_field: str) -> Iterator[tuple[str | Int32[np.ndarray, " length"], str]]:
    """(text, place) of every row; the place is `path:row`, from 1. Rows without a value are passed over.

    A column of lists of integers gives token ids in place of texts, those with an `attention_mask` of 0 left out.

    Raises:
      UserError: pyarrow is not installed; no Parquet file, or a damaged one; no such column, or one that is not text; a
        row group whose text would fill the memory; a text longer than `LONGEST_TEXT`.
    """
    arrow, parquet = _pyarrow(path)
    try:
        with parquet.ParquetFile(path) as file:
            field, are_ids = _check(path, file, text_field, arrow)
            masked = are_ids and MASK in file.schema_arrow.names
        dictionary = [] if are_ids else [field]
        with parquet.ParquetFile(path, page_checksum_verification=True, read_dictionary=dictionary) as file:
            row = 0
            for batch in file.iter_batches(batch_size=ROWS, columns=[field, MASK] if masked else [field]):
                masks = batch.column(MASK) if masked else [None] * len(batch)
                for entry, mask in zip(batch.column(field), masks, strict=True):
                    row += 1
                    if entry.is_valid:
                        where = f"{path}, row {row}"
                        yield _ids(entry, mask, where) if are_ids else _text(entry, where), f"{path}:{row}"
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {_first_line(error)}") from error


def _ids(entry: Any, mask: Any, where: str) -> Int32[np.ndarray, " length"]:
    """The token ids of one row."""
    values = entry.values.to_numpy(zero_copy_only=False)
    padding = mask.values.to_numpy(zero_copy_only=False) if mask is not None and mask.is_valid else None
    return ids_of_row(values, padding, where)


def _text(entry: Any, where: str) -> str:
    """The text of one row: it alone becomes a string here, however often the file names it."""
    stored = getattr(entry, "value", entry)  # of an entry of a table: the text itself
    size = stored.as_buffer().size
    if size > LONGEST_TEXT:
        raise UserError(f"{where}: a text of {size} bytes, more than {LONGEST_TEXT}: cut it into several rows.")
    text: str = stored.as_py()
    return text


def _check(path: Path, file: Any, text_field: str, arrow: Any) -> tuple[str, bool]:
    """The column that is read, and whether it holds token ids."""
    schema = file.schema_arrow
    field = field_of(schema.names, text_field)
    if field is None:
        names = ", ".join(map(repr, schema.names[:8])) or "none"
        raise UserError(
            f"{path}: no column text_field={text_field!r}; its columns: {names}.{suggest(text_field, schema.names)}"
        )
    kind = schema.field(field).type
    if arrow.types.is_dictionary(kind):
        kind = kind.value_type
    are_ids = _is_list(kind, arrow) and arrow.types.is_integer(kind.value_type)
    tests = (arrow.types.is_string, arrow.types.is_large_string, arrow.types.is_string_view)
    if not are_ids and not any(test(kind) for test in tests):
        raise UserError(f"{path}: column {field!r} holds {kind}, where text is expected (or lists of token ids).")
    columns = range(file.metadata.num_columns)
    paths = [file.metadata.schema.column(index).path for index in columns]
    column = next(index for index in columns if paths[index] == field or paths[index].startswith(f"{field}."))
    for group in range(file.metadata.num_row_groups):
        size = file.metadata.row_group(group).column(column).total_uncompressed_size
        if not 0 <= size <= LARGEST_GROUP:
            raise UserError(
                f"{path}: column {field!r} of row group {group} would take {size} bytes, more than "
                f"{LARGEST_GROUP}: write the file with smaller row groups."
            )
    return field, are_ids


def _is_list(kind: Any, arrow: Any) -> bool:
    types = arrow.types
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _pyarrow(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"{path}: reading Parquet needs pyarrow: python -m pip install 'jaxinterp[parquet]' (or pyarrow)."
        ) from error
    return pyarrow, pyarrow.parquet


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
