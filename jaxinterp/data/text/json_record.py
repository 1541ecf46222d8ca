"""The text, or the row of token ids, in a JSON object: a line of a .jsonl file, or a record of Array Record."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Int32

from jaxinterp.core.errors import UserError
from jaxinterp.core.json_value import Json
from jaxinterp.data.text.id_rows import MASK, field_of, ids_of_row


def content_of_object(
    record: Mapping[str, Json], text_field: str, where: str
) -> str | Int32[np.ndarray, " length"] | None:
    """The text in a field of a JSON object, or the token ids; None where the field is null, as in Parquet files.

    Args:
      where: file and line or record, for messages.
    Raises:
      UserError: there is no such field, or it holds no text that UTF-8 can write and no list of token ids.
    """
    field = field_of(record, text_field)
    if field is None:
        fields = ", ".join(repr(field) for field in list(record)[:8]) or "none"
        raise UserError(f"{where}: no field text_field={text_field!r}; its fields: {fields}.")
    text = record[field]
    if text is None:
        return None
    if isinstance(text, list):
        return ids_of_row(text, record.get(MASK), f"{where}: field {field!r}")
    if not isinstance(text, str):
        kind = type(text).__name__
        raise UserError(f"{where}: field {field!r} holds {kind}, where text is expected (or a list of token ids).")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can write and UTF-8 cannot
        raise UserError(f"{where}: field {field!r} holds half a surrogate pair, which is not text.") from error
    return text
