"""Arrays of a foreign file, checked against a table of what its format says: `{"W_enc": ("d_in", "features"), ...}`.

A reader opens its file without reading arrays (`StoredTensor` of models/weights.py) and names the axes of each. What is
missing, left over, of another shape, of another type, or not finite is refused by name, before the arrays are used.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxinterp.core.errors import UserError, suggest
from jaxinterp.models.files.weights import StoredTensor

AxesByName = dict[str, tuple[str, ...]]
"""The axes of every array by name; arrays that share the name of an axis agree on its size."""


def check_names(stored: Mapping[str, StoredTensor], layout: AxesByName, where: Path, hint: str = "") -> None:
    """Raises UserError if an array of the layout is missing, or one is there that it does not have."""
    for name in layout:
        if name not in stored:
            raise UserError(f"{where}: tensor {name!r} is missing; it has {', '.join(stored)}.{hint}")
    for name in stored:
        if name not in layout:
            raise UserError(
                f"{where}: tensor {name!r} is unknown, and one that changes the computation must not be ignored; "
                f"expected: {', '.join(layout)}.{hint or suggest(name, layout)}"
            )


def read_checked(
    stored: Mapping[str, StoredTensor], layout: AxesByName, where: Path, *, sizes: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """Every array of the layout, float32 (integers as they are).

    Args:
      sizes: axes whose size the configuration states.
    Raises:
      UserError: as `check_names`; a shape does not agree with the configuration or with the arrays before it; a value
        is NaN or infinite, or cannot be held in float32.
    """
    check_names(stored, layout, where)
    check_shapes(stored, layout, where, sizes=sizes)
    return {name: _numbers(stored[name], where) for name in layout}


def check_shapes(
    stored: Mapping[str, StoredTensor], layout: AxesByName, where: Path, *, sizes: Mapping[str, int]
) -> None:
    """Raises UserError if the shapes disagree with `sizes`, or among each other."""
    known = dict(sizes)
    for name, axes in layout.items():
        shape = stored[name].shape
        if not _fits(shape, axes, known):
            words = ", ".join(f"{axis}={known.get(axis, '?')}" for axis in axes)
            why = ": it is transposed" if len(axes) == 2 and _fits(shape[::-1], axes, known) else ""
            raise UserError(f"{where}: tensor {name!r} has shape {list(shape)}, expected [{words}]{why}.")
        if 0 in shape:
            raise UserError(f"{where}: tensor {name!r} of shape {list(shape)} is empty.")
        known |= zip(axes, shape, strict=True)


def _fits(shape: tuple[int, ...], axes: tuple[str, ...], known: Mapping[str, int]) -> bool:
    if len(shape) != len(axes):
        return False
    return all(known.get(axis, size) == size for axis, size in zip(axes, shape, strict=True)) and (
        len(set(zip(axes, shape, strict=True))) == len(set(axes))
    )


def _numbers(stored: StoredTensor, where: Path) -> np.ndarray:
    if stored.refusal is not None:
        raise UserError(f"{where}: tensor {stored.name!r} {stored.refusal}")
    array = stored.read(slice(None), None)
    if array.dtype.kind in "iu":
        return array
    broken = int(array.size - np.count_nonzero(np.isfinite(array)))
    if broken:
        raise UserError(f"{where}: {broken} of {array.size} values of tensor {stored.name!r} are NaN or infinite.")
    with np.errstate(over="ignore"):
        narrow = array.astype(np.float32)
    if array.dtype == np.float64 and not np.array_equal(narrow.astype(np.float64), array):
        raise UserError(
            f"{where}: tensor {stored.name!r} has type float64 and values that float32 cannot hold: convert the file "
            "to float32 first, where that is meant."
        )
    return narrow


def integer(array: Any, name: str, where: Path) -> int:
    """The one whole number of an array of one entry.

    Raises:
      UserError: it holds something else.
    """
    if array.dtype.kind not in "iu" or array.size != 1:
        raise UserError(f"{where}: tensor {name!r} should be one whole number.")
    return int(array.reshape(-1)[0])
