"""Rows of token ids in files of records: what tokenised data sets hold in the column `input_ids`.

A row is a document. Ids are taken as they are; where `attention_mask` lies beside them, positions with 0 are padding
and left out.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Int32

from jaxinterp.core.errors import UserError

FIELDS = ("input_ids", "token_ids", "tokens")
"""Where rows of ids are looked for, in files that have no text."""
MASK = "attention_mask"


def field_of(names: Iterable[str], text_field: str) -> str | None:
    """The field that is read: `text_field`, or one of token ids where a file without text has that; None: neither."""
    names = set(names)
    if text_field in names:
        return text_field
    return next((name for name in FIELDS if name in names), None) if text_field == "text" else None


def ids_of_row(values: Any, mask: Any, where: str) -> Int32[np.ndarray, " length"]:
    """A row of ids, padding left out.

    Args:
      values: numbers.
      mask: as many numbers, 0 for padding; None: there is no padding.
    Raises:
      UserError: a value is not a token id, or the mask has another length.
    """
    ids = np.asarray(values)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise UserError(f"{where}: a list of token ids is expected, not {ids.dtype} of shape {list(ids.shape)}.")
    if mask is not None:
        kept = np.asarray(mask)
        if kept.shape != ids.shape:
            raise UserError(f"{where}: {MASK} has shape {list(kept.shape)} for {len(ids)} ids.")
        ids = ids[kept != 0]
    outside = np.flatnonzero((ids < 0) | (ids >= 2**31))
    if len(outside):
        raise UserError(
            f"{where}: {ids[outside[0]]} at position {outside[0]} is not a token id: leave out what is padded or "
            f"ignored, or say it in {MASK}."
        )
    return ids.astype(np.int32)
