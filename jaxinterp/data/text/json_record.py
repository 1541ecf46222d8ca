"""The text in a JSON object: of a line of a .jsonl file, or of a record of Array Record."""

from collections.abc import Mapping
from typing import Any

from jaxinterp.core.errors import UserError


def text_of_object(record: Mapping[str, Any], text_field: str, where: str) -> str:
    """The text in a field of a JSON object.

    Args:
      where: file and line or record, for messages.
    Raises:
      UserError: there is no such field, or it holds no text that UTF-8 can write.
    """
    if text_field not in record:
        fields = ", ".join(repr(field) for field in list(record)[:8]) or "none"
        raise UserError(f"{where}: no field text_field={text_field!r}; its fields: {fields}.")
    text = record[text_field]
    if not isinstance(text, str):
        raise UserError(f"{where}: field {text_field!r} holds {type(text).__name__}, where text is expected.")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can write and UTF-8 cannot
        raise UserError(f"{where}: field {text_field!r} holds half a surrogate pair, which is no text.") from error
    return text
