"""NumPy's `.npz` archives: opened by reading the headers of their arrays; never a pickle.

Every member is an `.npy` file: magic, version, a header {descr, fortran_order, shape}, then the numbers. NumPy's own
reader allocates what the header claims; here the claim is compared with the size of the member first
(https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html).
"""

import io
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from jaxinterp.core.errors import UserError
from jaxinterp.interchange.fields import LARGEST_SIZE
from jaxinterp.interchange.zip_file import damage, members, read_member
from jaxinterp.models.files.weights import Rows, StoredTensor

HEADER = 16_384
"""Bytes that hold the header of any array of numbers."""


def open_npz(path: Path) -> dict[str, StoredTensor]:
    """Every array of an `.npz` file by name; reads headers only.

    Raises:
      UserError: it is not such an archive, an array holds pickled objects, or its header claims more than is there.
    """
    found = {}
    for name, info in members(path, compressed=True).items():
        if not name.endswith(".npy"):
            raise UserError(f"{path}: member {name!r} is not a .npy array; the file is damaged.")
        bare = name.removesuffix(".npy")
        found[bare] = _open_npy(path, info, bare)
    return found


def _open_npy(path: Path, info: zipfile.ZipInfo, name: str) -> StoredTensor:
    with damage(path), zipfile.ZipFile(path) as archive, archive.open(info) as member:
        start = io.BytesIO(member.read(min(HEADER, info.file_size)))
    try:
        version = np.lib.format.read_magic(start)
        readers: dict[tuple[int, int], Callable[..., Any]] = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        shape, fortran, dtype = readers[version](start)
    except (ValueError, KeyError, SyntaxError, TypeError, RecursionError, MemoryError, TokenError) as error:
        raise UserError(f"{path}: array {name!r} has no readable header ({error}); the file is damaged.") from error
    if dtype.hasobject:
        raise UserError(f"{path}: array {name!r} holds pickled objects, which can run code when read: it is refused.")
    if any(not 0 <= axis < LARGEST_SIZE for axis in shape):  # Python refuses to print the product of huge ones
        raise UserError(f"{path}: array {name!r} claims an axis that no array has; the file is damaged.")
    offset = start.tell()
    if math.prod(shape) * dtype.itemsize != info.file_size - offset:
        raise UserError(
            f"{path}: array {name!r} claims shape {list(shape)} of {dtype}, {math.prod(shape) * dtype.itemsize} bytes, "
            f"but {info.file_size - offset} are there; the file is truncated or damaged."
        )

    def read(rows: Rows, columns: slice | None) -> np.ndarray:
        flat = np.frombuffer(read_member(path, info), dtype, offset=offset)
        whole = flat.reshape(shape, order="F" if fortran else "C")
        return np.array(whole[rows if whole.ndim else ()] if columns is None else whole[rows, columns])

    plain = dtype.kind == "f" and dtype.itemsize in (2, 4, 8)
    refusal = None if plain else f"has type {dtype}; supported: float16, float32, float64."
    return StoredTensor(name, path, tuple(shape), read, refusal)
